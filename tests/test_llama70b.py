"""The random 70B: the types that llama.cpp's quantizer chooses, valid blocks, and the measuring, at a tiny size."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import gguf
import numpy as np
import pytest

from qtutor import QtutorError, llamacpp, results
from qtutor.decide import capacity
from qtutor.rigs import llama70b

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return llama70b.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", llama70b.TINY, "Q4_K_M")


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS",
                                  "IQ3_XXS", "IQ2_XS", "TQ2_0", "MXFP4", "NVFP4"])  # fmt: skip
def test_types_are_those_of_the_quantizer(name, tmp_path):
    """Quantize a full-precision file of the same shape for real: same types, same sizes, tensor by tensor."""
    f16 = llama70b.write(tmp_path / "f16.gguf", llama70b.TINY, "F16")
    kind = llamacpp.TYPES[name]
    imatrix = None
    if kind.needs_imatrix:
        imatrix = {t.name: np.ones(t.shape[-1], np.float32) for t in llamacpp.check_gguf(f16).tensors
                   if len(t.shape) == 2}  # fmt: skip
    real = llamacpp.check_gguf(llamacpp.quantize(f16, tmp_path / "real.gguf", name, imatrix)) if name != "F16" else None
    made = llamacpp.check_gguf(llama70b.write(tmp_path / "made.gguf", llama70b.TINY, name))
    assert made.file_bytes - made.data_offset == capacity.size(llama70b.TINY, name).tensor_bytes
    if real:
        assert made.metadata["general.file_type"] == real.metadata["general.file_type"]
        ours, theirs = ({(t.name, t.type, t.shape, t.nbytes) for t in file.tensors} for file in (made, real))
        assert ours == theirs
    assert _loads(made.path)


def _loads(path) -> bool:
    """llama.cpp loads it, with its own check that every block is valid."""
    lib = llamacpp.native()
    params = lib.llama_model_default_params()
    params.check_tensors, params.n_gpu_layers = True, 0
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if model:
        lib.llama_model_free(model)
    return bool(model)


def test_a_broken_block_would_be_noticed(tiny, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    data = bytearray(tiny.read_bytes())
    tensor = next(t for t in llamacpp.check_gguf(tiny).tensors if t.type == "Q4_K")
    data[tensor.offset : tensor.offset + 2] = np.float16(np.inf).tobytes()
    damaged.write_bytes(data)
    assert not _loads(damaged)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "IQ4_XS", "IQ3_S", "IQ2_XXS"])
def test_blocks_decode_to_normal_weights(kind):
    """gguf's dequantizer reads what was drawn: mean 0, standard deviation STD, less what so few bits lose."""
    weights = gguf.dequantize(llama70b.blocks(kind, 512, seed=3), gguf.GGMLQuantizationType[kind])
    assert abs(weights.mean()) < 0.05 * llama70b.STD
    assert 0.8 * llama70b.STD < weights.std() < 1.1 * llama70b.STD
    # the same draw, before it was quantized
    _, per_block, _ = llamacpp.GGML[kind]
    drawn = np.random.default_rng(3).standard_normal((512, per_block), dtype=np.float32) * llama70b.STD
    assert np.corrcoef(weights.ravel(), drawn.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_float_blocks(kind):
    data = llama70b.blocks(kind, 4096, seed=1)
    weights = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).ravel()
    drawn = np.random.default_rng(1).standard_normal((4096, 1), dtype=np.float32).ravel() * np.float32(llama70b.STD)
    assert np.allclose(weights, drawn, rtol=2**-7, atol=1e-7)


def test_blocks_do_not_depend_on_threads():
    assert np.array_equal(llama70b.blocks("Q6_K", 37, threads=1), llama70b.blocks("Q6_K", 37, threads=4))


def test_same_arguments_same_bytes(tiny, tmp_path):
    again = llama70b.write(tmp_path / "again.gguf", llama70b.TINY, "Q4_K_M", threads=3)
    other = llama70b.write(tmp_path / "other.gguf", llama70b.TINY, "Q4_K_M", seed=1)
    assert again.read_bytes() == tiny.read_bytes() != other.read_bytes()


def test_pieces_cover_each_tensor_once():
    pool = np.zeros(1000, np.uint8)
    tensor = llamacpp.Tensor("t", "Q4_0", (1, 1), 5000, 12345)
    pieces = list(llama70b._pieces(tensor, pool, 300 + 7 * pool.size, 256))
    at = 5000
    for offset, start, n in pieces:
        assert offset == at and 0 < n <= 256 and start + n <= pool.size
        assert start == (300 + offset - 5000) % 1000  # as if the pool were endless
        at += n
    assert at == 5000 + 12345


def test_rows_of_a_matrix_differ(tmp_path):
    config = dict(llama70b.TINY, vocab_size=4096)
    path = llama70b.write(tmp_path / "m.gguf", config, "Q6_K")
    rows = {t.name: t.data for t in gguf.GGUFReader(path).tensors}["output.weight"]
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_real_shape_is_the_real_size():
    size = capacity.size("Llama-2-70B", "Q6_K")
    assert size.weights == 68_976_648_192
    assert abs(size.file_bytes - 56.59e9) < 0.01e9  # TheBloke/Llama-2-70B-Chat-GGUF


@pytest.mark.parametrize("call, words", [
    (lambda folder: llama70b.write(folder / "a.gguf", llama70b.TINY, "Q9"), "no quantization type"),
    (lambda folder: llama70b.write(folder, llama70b.TINY, "Q8_0"), "is a folder"),
    (lambda folder: llama70b.write(folder / "a.gguf", "Llama-9", "Q8_0"), "no model"),
    (lambda folder: llama70b.blocks("Q8_1", 4), "no tensor type"),
    (lambda folder: llama70b.quantize_blocks("Q6_K", np.zeros(255)), "255 weights are no whole number"),
    (lambda folder: llama70b.measure(folder / "none.gguf"), "no file"),
    (lambda folder: llama70b.record(folder / "none", ["Q6_K"], llama70b.TINY), "no folder"),
    (lambda folder: llama70b.record(folder, ["Q9"], llama70b.TINY), "no quantization type"),
])  # fmt: skip
def test_one_sentence(call, words, tmp_path):
    with pytest.raises(QtutorError, match=words) as error:
        call(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_before_writing(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=10**9)
    monkeypatch.setattr(llama70b.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QtutorError, match=r"1\.0 GB free and the file needs 56\.6 GB"):
        llama70b.write(tmp_path / "big.gguf", "Llama-2-70B", "Q6_K")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llama70b, "_fill", full)
    with pytest.raises(QtutorError, match="No space left"):
        llama70b.write(tmp_path / "m.gguf", llama70b.TINY, "Q8_0")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- measuring


def test_measure_and_tools(tiny):
    seen = []
    rows = llama70b.measure(tiny, "Q4_K_M", device_bandwidth={"bandwidth_gb_per_s": 50.0}, on_row=seen.append,
                            **llama70b.QUICK | {"depth": 128, "depth_generate": 4})  # fmt: skip
    assert seen == rows
    assert [row["kind"] for row in rows] == ["model", "depth", "batch", "batch"]
    model, size = rows[0], capacity.size(llama70b.TINY, "Q4_K_M")
    assert model["fits"] and model["file_bytes"] == tiny.stat().st_size
    assert model["read_bytes_per_token"] == size.read_bytes
    assert model["host_model_mib"] + model["device_model_mib"] > 0.9 * size.tensor_bytes / 2**20
    ctx = capacity.kv_bytes(llama70b.TINY, model["ctx"]) / 2**20
    assert abs(model["host_kv_mib"] + model["device_kv_mib"] - ctx) < 0.006
    for row in rows:
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0
        assert row["ceiling_share"] == pytest.approx(row["decode_tokens_per_s"] / row["ceiling_tokens_per_s"])
    halfway = 24 / 2  # the mean length of the cache while 24 tokens are written into an empty one
    wanted = capacity.ceiling(llama70b.TINY, "Q4_K_M", halfway, 50.0)
    assert model["ceiling_tokens_per_s"] == pytest.approx(wanted)
    assert rows[3]["ceiling_tokens_per_s"] == pytest.approx(
        capacity.ceiling(llama70b.TINY, "Q4_K_M", 8 + 4 / 2, 50.0, users=4))  # fmt: skip
    tools = llama70b.run_tools(tiny, "Q4_K_M", job=llama70b.QUICK)
    found = {row["tool"] for row in tools}
    for name in ("llama-bench", "llama-batched-bench"):
        try:
            llamacpp.tool(name)
        except QtutorError:
            continue
        assert name in found
    for row in tools:
        assert all(value > 0 for key, value in row.items() if key.endswith("tokens_per_s"))


def test_our_generation_is_the_model_s(tiny):
    """The measured context computes what llamacpp.Model computes: the same tokens, the same logits."""
    import ctypes

    lib = llamacpp.native()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(os.fsencode(tiny), params)
    context = llama70b._Context(lib, model, 64, 2, "F16", 1)
    try:
        ids = np.random.default_rng(0).integers(0, context.n_vocab, 2 * 10)
        context.prompt(10, 2)  # draws exactly these, ten for each sequence
        pointer = ctypes.cast(lib.llama_get_logits_ith(context._ctx, -1), ctypes.POINTER(ctypes.c_float))
        second = np.ctypeslib.as_array(pointer, (context.n_vocab,)).copy()
        assert context.finite()
    finally:
        context.close()
        lib.llama_model_free(model)
    with llamacpp.Model(tiny, ctx=64, exact=False, threads=1) as reference:
        wanted = reference.logits(ids[10:])[-1]
    assert np.allclose(second, wanted, atol=0.02 * np.abs(wanted).max())


def test_settings_are_checked(tiny):
    with pytest.raises(QtutorError, match="no setting 'promt'"):
        llama70b.measure(tiny, promt=3)
    with pytest.raises(QtutorError, match="no cache type 'Q9'"):
        llama70b.measure(tiny, kv_type="Q9")
    with pytest.raises(QtutorError, match="more than ctx=64"):
        llama70b.measure(tiny, **llama70b.QUICK | {"ctx": 64})


def test_a_child_that_dies_is_a_row(tiny, monkeypatch):
    """A native abort (here: a process that kills itself) ends in fits=False and a sentence, not in our own end."""
    monkeypatch.setattr(llama70b.sys, "executable", "/bin/false")
    rows = llama70b.measure(tiny, "Q4_K_M")
    assert len(rows) == 1 and rows[0]["fits"] is False
    assert "ended with code 1" in rows[0]["note"] and "\n" not in rows[0]["note"]


def test_time_is_limited(tiny):
    rows = llama70b.measure(tiny, "Q4_K_M", limit_s=0.01)
    assert rows[0]["fits"] is False and "code -9" in rows[0]["note"]


def test_record_saves_after_each_type_and_keeps_others(tmp_path, monkeypatch):
    folder, out, said = tmp_path / "models", tmp_path / "out", []
    folder.mkdir()
    fake = {"copy_gb_per_s": 50.0, "read_gb_per_s": 40.0, "bandwidth_gb_per_s": 50.0}
    child = llama70b._child

    def quick(argv, limit_s, on_row):
        if argv == ["--child-bandwidth"]:
            return on_row({"kind": "bandwidth"} | fake)
        return child(argv, limit_s, on_row)

    monkeypatch.setattr(llama70b, "_child", quick)
    settings = llama70b.QUICK | {"batches": (2,)}
    common = {"config": llama70b.TINY, "directory": out, "say": said.append, "tools": "none"}
    llama70b.record(folder, ["Q6_K", "Q8_0"], **common, **settings)
    assert list(folder.iterdir()) == []
    machine = results.machine_folder()
    first = results.load("llama70b", machine, out)
    assert [row.get("type") for row in first.rows] == [None, "Q6_K", "Q6_K", "Q8_0", "Q8_0"]
    llama70b.record(folder, ["Q8_0", "Q4_0"], **common, **settings)
    second = results.load("llama70b", machine, out)
    assert sorted({row["type"] for row in second.rows if "type" in row}) == ["Q4_0", "Q6_K", "Q8_0"]
    assert [row["kind"] for row in second.rows].count("bandwidth") == 1
    assert [row for row in second.rows if row.get("type") == "Q6_K"] == first.rows[1:3]
    rows = llama70b.record(folder, ["Q6_K", "Q8_0"], **common, budget_s=0.0, **settings)
    assert {row.get("type") for row in rows} == {None, "Q6_K"}
    assert any("left out" in line for line in said)
    kept = results.load("llama70b", machine, out).rows  # what the time did not suffice for stays as it was
    before = [row for row in second.rows if row.get("type") == "Q8_0"]
    assert [row for row in kept if row.get("type") == "Q8_0"] == before


def test_command_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "qtutor.rigs.llama70b", "--tiny", "--types", "Q4_0", "--tools", "none",
                           "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("*/llama70b.json")
    results.validate(json.loads(found.read_text()))
    wrong = subprocess.run([sys.executable, "-m", "qtutor.rigs.llama70b", "--tiny", "--types", "Q9"], cwd=ROOT,
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert wrong.returncode == 1 and wrong.stderr.strip().startswith("There is no quantization type 'Q9'")


# ----------------------------------------------------------------------------------------------- energy and memory


class FakeNvml:
    """Enough of pynvml: a card that draws 300 W and holds 2 GiB; ``counter`` says whether it counts its energy."""

    class NVMLError(Exception):
        pass

    def __init__(self, counter=True):
        self.counter = counter

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        import time

        if not self.counter:
            raise self.NVMLError
        return int(time.perf_counter() * 300 * 1000)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(used=2 * 2**30, total=80 * 2**30)


@pytest.mark.parametrize("counter, source", [(True, "counter"), (False, "sampled power")])
def test_joules(counter, source, monkeypatch):
    import time

    monkeypatch.setattr(llama70b, "LEAST_FOR_ENERGY_S", 0.1)
    gpu = llama70b.Gpu(FakeNvml(counter), None)
    try:
        assert gpu.source == source
        found = llama70b._region(gpu, lambda: time.sleep(0.06), 6, 3, 0.0)
        assert found["watts"] == pytest.approx(300, rel=0.1)
        assert found["joules_per_token"] == pytest.approx(found["watts"] / found["tokens_per_s"], rel=0.1)
        short = llama70b._region(gpu, lambda: None, 1, 2, 0.0)
        assert short["joules_per_token"] is None  # too short for the counter
        time.sleep(0.05)
        assert gpu.peak == 2 * 2**30
    finally:
        gpu.close()


def test_weights_larger_than_the_gpu(tiny):
    gpu = types.SimpleNamespace(total=lambda: 2**20, used=lambda: 2**19)
    lib = types.SimpleNamespace(llama_supports_gpu_offload=lambda: True)
    with pytest.raises(QtutorError, match="larger than the free GPU memory"):
        llama70b._load(lib, llamacpp.check_gguf(tiny), gpu)


def test_70b_is_not_started_on_a_cpu():
    gguf_file = types.SimpleNamespace(tensors=[types.SimpleNamespace(nbytes=50 * 2**30)])
    lib = types.SimpleNamespace(llama_supports_gpu_offload=lambda: False)
    with pytest.raises(QtutorError, match="computes on the CPU only"):
        llama70b._load(lib, gguf_file, None)


def test_bandwidth():
    found = llama70b.bandwidth("cpu", gib=0.02)
    assert found["bandwidth_gb_per_s"] == max(found["copy_gb_per_s"], found["read_gb_per_s"]) > 0


def test_ready_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(llama70b.Gpu, "open", classmethod(lambda cls: None))
    assert llama70b.ready(tmp_path) == (False, "There is no NVIDIA GPU here.")
    card = types.SimpleNamespace(total=lambda: 24 * 2**30, close=lambda: None)
    monkeypatch.setattr(llama70b.Gpu, "open", classmethod(lambda cls: card))
    lib = types.SimpleNamespace(llama_supports_gpu_offload=lambda: True)
    capacity.fits("Llama-2-70B", "Q6_K", 4096)  # planned before the library is exchanged
    monkeypatch.setattr(llamacpp, "_native", lambda: lib)
    assert llama70b.ready(tmp_path)[1] == "The GPU has 24 GiB, and Q6_K needs 55."
    card.total = lambda: 80 * 2**30
    monkeypatch.setattr(llama70b.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**9))
    assert "has no room for a file of 57 GB" in llama70b.ready(tmp_path)[1]
    monkeypatch.setattr(llama70b.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**11))
    assert llama70b.ready(tmp_path)[0]
