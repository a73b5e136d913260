"""llamacpp against llama.cpp's own programs, PyTorch and the gguf package; and files that are not what they
say.  A native crash would end pytest itself, so every refusal here also shows that the process is alive."""

import os
import re
import shutil
import signal
import subprocess
import sys

import forked
import gguf
import numpy as np
import pytest
import tiny_llama
import torch
import transformers

from qtutor import QtutorError, gguf_export, gguf_file, llamacpp

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])
DENSE = [t.name for t in llamacpp.TYPES.values() if not t.needs_imatrix and not t.overrides]
NEED = [t.name for t in llamacpp.TYPES.values() if t.needs_imatrix]


def has_tool(name):
    try:
        return llamacpp.tool(name)
    except QtutorError:
        return None


needs_quantize = pytest.mark.skipif(not has_tool("llama-quantize"), reason="llama-quantize is not installed")
needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="it forks")
needs_imatrix_tool = pytest.mark.skipif(not has_tool("llama-imatrix"), reason="llama-imatrix is not installed")


@pytest.fixture(scope="module")
def llama():
    return tiny_llama.model(layers=2, intermediate_size=256)


@pytest.fixture(scope="module")
def f32(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return gguf_export.export(llama, path, tokenizer=tiny_llama.tokenizer())


@pytest.fixture(scope="module")
def q4(f32):
    return llamacpp.quantize(f32, f32.with_name("tiny-q4.gguf"), "Q4_K_M")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 512, 1100)


@pytest.fixture(scope="module")
def importance(llama, tokens):
    return llamacpp.imatrix(llama, tokens, ctx=256)


def run(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, timeout=120)


def tensor_bytes(path):
    data = path.read_bytes()
    return {
        t.name: (t.type, data[t.offset : t.offset + t.nbytes]) for t in llamacpp.check_gguf(path).tensors
    }


# --------------------------------------------------------------------------------------------- quantize


@needs_quantize
@pytest.mark.parametrize("name", DENSE)
def test_same_bytes_as_llama_quantize(f32, tmp_path, name):
    ours = llamacpp.quantize(f32, tmp_path / "ours.gguf", name)
    run(llamacpp.tool("llama-quantize"), f32, tmp_path / "theirs.gguf", name, 1)
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@needs_quantize
@pytest.mark.parametrize("name", ["Q8_0", "Q3_K_M", "IQ4_XS"])
def test_same_bytes_as_llama_quantize_allowed_to_requantize(q4, tmp_path, name):
    ours = llamacpp.quantize(q4, tmp_path / "ours.gguf", name, requantize=True)
    run(llamacpp.tool("llama-quantize"), "--allow-requantize", q4, tmp_path / "theirs.gguf", name, 1)
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def write_imatrix(path, importance, n=256):
    """The file that llama-imatrix writes: sums of squares and token counts."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", n)
    for name, values in importance.items():
        writer.add_tensor(name + ".in_sum2", (values * np.float32(n))[None])
        writer.add_tensor(name + ".counts", np.array([[n]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
@needs_quantize
@pytest.mark.parametrize("name", [*NEED, *"Q6_K Q5_1 Q5_0 Q4_K_M Q4_1 Q4_0 IQ4_NL IQ4_XS IQ3_M Q2_K".split()])
def test_same_tensors_as_llama_quantize_with_an_importance_matrix(f32, tmp_path, importance, name):
    ours = llamacpp.quantize(f32, tmp_path / "ours.gguf", name, imatrix=importance)
    matrix = write_imatrix(tmp_path / "imatrix.gguf", importance)  # counts are powers of two: exact
    run(llamacpp.tool("llama-quantize"), "--imatrix", matrix, f32, tmp_path / "theirs.gguf", name, 1)
    assert tensor_bytes(ours) == tensor_bytes(tmp_path / "theirs.gguf")
    # the program also notes which file the matrix came from; ours comes from none
    theirs = llamacpp.check_gguf(tmp_path / "theirs.gguf").metadata
    noted = {key: value for key, value in theirs.items() if not key.startswith("quantize.imatrix.")}
    assert llamacpp.check_gguf(ours).metadata == noted and len(theirs) > len(noted)


def test_an_importance_matrix_from_the_file_of_llama_imatrix(f32, tmp_path, importance):
    matrix = write_imatrix(tmp_path / "imatrix.gguf", importance)
    read = llamacpp.read_imatrix(matrix)
    assert read.keys() == importance.keys()
    assert all(np.array_equal(read[name], values) for name, values in importance.items())
    ours = llamacpp.quantize(f32, tmp_path / "a.gguf", "IQ2_XS", imatrix=importance)
    for path in (matrix, str(matrix)):
        assert tensor_bytes(llamacpp.quantize(f32, tmp_path / "b.gguf", "IQ2_XS", imatrix=path)) == tensor_bytes(ours)
    (tmp_path / "old.dat").write_bytes(b"\x01\0\0\0" * 9)
    (tmp_path / "cut.gguf").write_bytes(matrix.read_bytes()[:500])
    for wrong in (tmp_path / "old.dat", tmp_path / "cut.gguf", tmp_path / "none.gguf", f32, [1.0], 3):
        refused("no importance matrix in GGUF", llamacpp.quantize, f32, tmp_path / "c.gguf", "IQ2_XS", imatrix=wrong)


@needs_quantize
def test_every_type_that_llama_quantize_offers_is_here():
    """Also a newer llama.cpp's: whoever updates it hears which types are missing."""
    help_text = subprocess.run([llamacpp.tool("llama-quantize"), "--help"], capture_output=True, text=True).stdout
    offered = set(re.findall(r"^ +\d+ +or +(\w+) +:", help_text, re.M))
    assert {"Q8_0", "IQ1_S", "TQ1_0", "MXFP4_MOE"} <= offered
    known = {*llamacpp.TYPES, *gguf_file._ALIASES, "MXFP4_MOE", "COPY"}  # for a dense model: MXFP4, by override
    assert offered - known == set()


@needs_quantize
@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_block_float_formats_are_llama_quantizes(f32, tmp_path, name):
    ours = llamacpp.quantize(f32, tmp_path / "ours.gguf", name)
    override = f"{llamacpp.TYPES[name].overrides[0][0]}={name}"
    run(llamacpp.tool("llama-quantize"), "--tensor-type", override, f32, tmp_path / "theirs.gguf", "MXFP4_MOE", 1)
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@needs_quantize
def test_same_bytes_as_llama_quantize_with_overrides(f32, tmp_path):
    program = llamacpp.tool("llama-quantize")
    overrides = {r"blk\.0\.ffn_down": "Q8_0", "attn_v": "Q6_K"}
    ours = llamacpp.quantize(f32, tmp_path / "a.gguf", "Q3_K_S", tensor_types=overrides)
    options = [x for k, v in overrides.items() for x in ("--tensor-type", f"{k}={v}")]
    run(program, *options, f32, tmp_path / "b.gguf", "Q3_K_S", 1)
    assert ours.read_bytes() == (tmp_path / "b.gguf").read_bytes()
    types = {t.name: t.type for t in llamacpp.check_gguf(ours).tensors}
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["blk.1.ffn_down.weight"] == "Q3_K"
    assert types["blk.1.attn_v.weight"] == "Q6_K"


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_block_float_formats_reach_a_dense_model(f32, tmp_path, name):
    path = llamacpp.quantize(f32, tmp_path / "m.gguf", name)
    types = {t.name: t.type for t in llamacpp.check_gguf(path).tensors}
    matrices = [n for n in types if n.startswith("blk.") and "norm" not in n]
    assert {types[n] for n in matrices} == {name} and types["token_embd.weight"] == "Q8_0"
    with llamacpp.Model(path, ctx=32) as model:
        assert np.isfinite(model.logits(range(32))).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M", "IQ2_XS", "Q2_K"])
def test_plan_is_what_quantize_then_does(f32, tmp_path, importance, name):
    needs = llamacpp.TYPES[name].needs_imatrix
    planned = llamacpp.plan(f32, name, imatrix=needs)
    path = llamacpp.quantize(f32, tmp_path / "m.gguf", name, imatrix=importance if needs else None)
    done = llamacpp.check_gguf(path).tensors
    row = lambda t: (t.name, t.type, t.shape, t.nbytes)  # noqa: E731
    assert sorted(map(row, planned)) == sorted(map(row, done))
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_bits_per_weight_and_tensor_table(f32, q4):
    assert llamacpp.bits_per_weight(f32) == 32
    table = llamacpp.tensor_table(q4)
    reader = gguf.GGUFReader(q4)
    assert len(table) == len(reader.tensors)
    for row, tensor in zip(table, reader.tensors, strict=True):
        assert row["name"] == tensor.name and row["type"] == tensor.tensor_type.name
        assert row["shape"] == tuple(reversed(tensor.shape.tolist())) and row["bytes"] == tensor.n_bytes
    expected = 8 * sum(r["bytes"] for r in table) / sum(r["weights"] for r in table)
    assert llamacpp.bits_per_weight(q4) == expected and 4.5 < expected < 7


# -------------------------------------------------------------------------------------- importance matrix


def test_imatrix_is_the_mean_square_of_the_inputs(llama, tokens, importance):
    inputs = {}
    layer = llama.model.layers[1]
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.setdefault("x", a[0]))
    with torch.inference_mode():
        llama(torch.from_numpy(tokens[:1024].reshape(4, 256)))
    hook.remove()
    expected = inputs["x"].double().square().mean((0, 1)).numpy()
    assert np.allclose(importance["blk.1.ffn_down.weight"], expected, rtol=1e-4)
    assert len(importance) == 14 and all(v.dtype == np.float32 for v in importance.values())
    assert not any(m._forward_pre_hooks for m in llama.modules())


@needs_imatrix_tool
def test_imatrix_agrees_with_llama_imatrix(f32, llama, tmp_path):
    """Relative difference 1e-4, with the F32 cache and without the fused attention kernel."""
    text = "\n".join(t for t in tiny_llama.TEXTS if "\x00" not in t and "<|" not in t) * 6
    (tmp_path / "text.txt").write_text(text, newline="")
    run(
        llamacpp.tool("llama-imatrix"), "-m", f32, "-f", tmp_path / "text.txt", "-o", tmp_path / "i.gguf",
        "-c", 256, "-b", 256, "-t", 2, "-ctk", "f32", "-ctv", "f32", "-fa", "off",
    )  # fmt: skip
    with llamacpp.Model(f32, ctx=32) as model:
        ours = llamacpp.imatrix(llama, model.tokenize(text), ctx=256)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    theirs = {n.removesuffix(".in_sum2"): tensors[n].ravel() for n in tensors if n.endswith(".in_sum2")}
    assert theirs.keys() == ours.keys()
    for name, total in theirs.items():
        mean = total / tensors[name + ".counts"].ravel()[0]
        assert np.allclose(ours[name], mean, rtol=1e-4, atol=0), name  # each of its values


def test_imatrix_lowers_the_weighted_error(f32, tmp_path, importance):
    """What an importance matrix is for: a smaller error where the activations are large."""
    shuffled = np.random.default_rng(0).permutation(np.logspace(0, 3, 256)).astype(np.float32)
    skewed = dict.fromkeys(importance, shuffled)
    weights = tensor_data(f32)
    errors = []
    for matrix in (None, skewed):
        done = tensor_data(llamacpp.quantize(f32, tmp_path / "m.gguf", "Q3_K_S", imatrix=matrix))
        errors.append(sum(((done[n] - weights[n]) ** 2 * skewed[n]).sum() for n in skewed))
    assert errors[1] < 0.9 * errors[0]


def tensor_data(path):
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


# --------------------------------------------------------------------------------------------------- running


def test_logits_agree_with_pytorch_and_depend_on_the_past_only(f32, llama, tokens):
    with torch.inference_mode():
        reference = llama(torch.from_numpy(tokens[None, :300])).logits[0].numpy()
    with llamacpp.Model(f32, ctx=512) as model:
        logits = model.logits(tokens[:300])
        assert logits.dtype == np.float32 and logits.shape == (300, 512)
        assert np.abs(logits - reference).max() < 1e-4
        assert np.array_equal(model.logits(tokens[:300]), logits)  # nothing is left in the cache
        assert np.abs(model.logits(tokens[:7]) - logits[:7]).max() < 1e-4
    with llamacpp.Model(f32, ctx=512, exact=False) as model:
        assert np.abs(model.logits(tokens[:300]) - reference).max() < 0.1


def test_logits_of_the_last_positions_only(f32, tokens):
    with llamacpp.Model(f32, ctx=64) as model:
        whole = model.logits(tokens[:50])
        for first in (0, 1, 25, 49):
            part = model.logits(tokens[:50], first=first)
            assert part.shape == whole[first:].shape and np.abs(part - whole[first:]).max() < 1e-4
        refused("one of the 50 positions", model.logits, tokens[:50], first=50)
        refused("one of the 50 positions", model.logits, tokens[:50], first=-1)


def test_quantized_logits_match_the_dequantized_weights(q4, tokens):
    """llama.cpp also rounds the activations to 8 bits, so this agrees closely, not exactly."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(q4.parent, gguf_file=q4.name, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(tokens[None, :64])).logits[0].numpy()
    with llamacpp.Model(q4, ctx=64) as model:
        logits = model.logits(tokens[:64])
    assert np.sqrt(((logits - expected) ** 2).mean()) < 0.1 * expected.std()


def test_greedy_generation_matches_hugging_face(f32, llama):
    with llamacpp.Model(f32, ctx=64) as model:
        prompt = model.tokenize("The for statement")
        ids = torch.tensor([prompt])
        expected = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert model.generate("The for statement", 12) == model.detokenize(expected[0, len(prompt) :].tolist())


def test_sampling_is_repeatable_by_seed_and_stops_at_the_context(f32):
    with llamacpp.Model(f32, ctx=24) as model:
        first = model.generate("The", 16, temperature=1.0, seed=1)
        assert model.generate("The", 16, temperature=1.0, seed=1) == first
        assert model.generate("The", 16, temperature=1.0, seed=2) != first
        assert model.generate("The", 10_000)  # ends when the context is full
        assert model.generate("The", 0) == ""


def test_sequences_side_by_side_compute_what_each_does_alone(f32, tokens):
    ids = tokens[:36].reshape(3, 12)
    with llamacpp.Model(f32, ctx=64) as model:
        alone = [model.logits(row) for row in ids]
    with llamacpp.Model(f32, ctx=64, sequences=3) as model:
        prompt = model.step(ids[:, :10], 0).copy()
        assert prompt.shape == (3, 512) and np.abs(prompt - [one[9] for one in alone]).max() < 1e-4
        first = model.step(ids[:, 10:11], 10).copy()
        assert np.abs(first - [one[10] for one in alone]).max() < 1e-4
        model.rewind(10)
        again = model.step(ids[:, 10:12], 10)
        assert np.abs(again - [one[11] for one in alone]).max() < 1e-4
        model.clear()
        assert np.abs(model.step(ids[:, :1], 0) - [one[0] for one in alone]).max() < 1e-4
        refused("shape", model.step, ids[:2], 0)
        refused("below 64", model.step, ids, 60)
        assert model.generate("The", 3)


def test_memory_is_llama_cpps_account_and_follows_the_cache_type(f32):
    found = {}
    for kind in ("F32", "F16", "Q8_0", "Q4_0"):
        with llamacpp.Model(f32, ctx=256, sequences=2, exact=False, kv_type=kind) as model:
            found[kind] = model.memory()
            assert np.isfinite(model.step(np.ones((2, 5), int), 0)).all()
    kv = 2 * 2 * 2 * 64 * 512 / 2**20  # keys and values, layers, kv heads, head size, tokens
    for kind, width in {"F32": 4, "F16": 2, "Q8_0": 34 / 32, "Q4_0": 18 / 32}.items():
        assert found[kind]["host_kv_mib"] + found[kind]["device_kv_mib"] == pytest.approx(kv * width, abs=0.02)
    assert found["F32"]["host_model_mib"] > 1 and found["F32"]["host_compute_mib"] > 0
    refused("no cache type", llamacpp.Model, f32, kv_type="Q2_K")


def test_nothing_is_printed(f32, tmp_path, capfd):
    llamacpp.quantize(f32, tmp_path / "m.gguf", "Q4_0")
    with llamacpp.Model(tmp_path / "m.gguf", ctx=32) as model:
        model.generate("The", 4)
    with pytest.raises(QtutorError):
        llamacpp.quantize(tmp_path / "m.gguf", tmp_path / "n.gguf", "Q4_0")
    assert capfd.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------------- bad input


def refused(match, function, *args, **kwargs):
    with pytest.raises(QtutorError, match=match) as info:
        function(*args, **kwargs)
    text = str(info.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text.replace("llama. ", "")


def test_types_and_sources_that_cannot_be(f32, q4, tmp_path):
    target = tmp_path / "m.gguf"
    refused("no quantization type", llamacpp.quantize, f32, target, "Q9_9")
    refused("already quantized", llamacpp.quantize, q4, target, "Q4_0")
    refused("importance matrix", llamacpp.quantize, f32, target, "IQ2_XS")
    refused("importance matrix", llamacpp.quantize, f32, target, "Q2_K_S")
    refused("called v_proj", llamacpp.quantize, f32, target, "Q4_0", tensor_types={"v_proj": "Q8_0"})
    refused("names no tensor", llamacpp.quantize, f32, target, "Q4_0", imatrix={"q_proj": np.ones(8, np.float32)})
    refused("no tensor type", llamacpp.quantize, f32, target, "Q4_0", tensor_types={"attn_v": "Q9"})
    refused("regular expression", llamacpp.quantize, f32, target, "Q4_0", tensor_types={"(": "Q8_0"})
    refused("no file", llamacpp.quantize, tmp_path / "none.gguf", target, "Q4_0")
    refused("is the source", llamacpp.quantize, f32, f32, "Q4_0")
    assert os.listdir(tmp_path) == []


def test_importance_matrices_that_cannot_be(f32, llama, importance, tokens, tmp_path):
    target = tmp_path / "m.gguf"
    short = {name: values[:100] for name, values in importance.items()}
    refused("another model", llamacpp.quantize, f32, target, "IQ2_XS", imatrix=short)
    bad = {name: np.full_like(values, np.nan) for name, values in importance.items()}
    refused("non-finite", llamacpp.quantize, f32, target, "IQ2_XS", imatrix=bad)
    part = {k: v for k, v in importance.items() if "attn_q" not in k}
    refused("importance matrix", llamacpp.quantize, f32, target, "IQ2_XS", imatrix=part)
    refused("at least one window", llamacpp.imatrix, llama, tokens[:100], ctx=256)
    refused("another tokenizer", llamacpp.imatrix, llama, tokens + 500, ctx=256)
    assert os.listdir(tmp_path) == []


def test_targets_that_cannot_be_written(f32, tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot be written", llamacpp.quantize, f32, tmp_path / "file" / "m.gguf", "Q4_0")
    refused("is a folder", llamacpp.quantize, f32, tmp_path, "Q4_0")
    made = llamacpp.quantize(f32, tmp_path / "new" / "folder" / "m.gguf", "Q4_0")
    assert os.listdir(made.parent) == ["m.gguf"]


def test_misuse_of_a_model(f32):
    refused("no file", llamacpp.Model, "nowhere.gguf")
    refused("GiB", llamacpp.Model, f32, ctx=10**10)
    refused("at least 1", llamacpp.Model, f32, ctx=0)
    with llamacpp.Model(f32, ctx=16) as model:
        refused("1 to 16 tokens", model.logits, range(17))
        refused("1 to 16 tokens", model.logits, [])
        refused("Token ids", model.logits, [512])
        refused("Token ids", model.logits, [-1])
        refused("Token ids", model.logits, [0.5])
        refused("1 to 15", model.generate, "")
        refused("surrogate", model.tokenize, "\ud800")
        refused("temperature", model.generate, "The", temperature=-1)
        assert model.detokenize([]) == ""
    refused("closed", model.logits, [1])
    refused("closed", model.generate, "The")
    model.close()


def everything(path, tmp_path):
    """Use a file in every way; QtutorError is the only thing that may happen."""
    try:
        with llamacpp.Model(path, ctx=16, threads=1) as model:
            model.tokenize("The <|endoftext|> 1\r\n😀")
            model.logits([0, 1, 2])
            model.generate("The", 2)
        llamacpp.plan(path, "Q4_0")
        if not llamacpp.check_gguf(path).quantized:
            llamacpp.quantize(path, tmp_path / "out.gguf", "Q4_0")
    except QtutorError as err:
        assert "\n" not in str(err)
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(q4, tmp_path, fraction):
    data = q4.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(fraction * len(data))])
    refused("cut.gguf", llamacpp.check_gguf, tmp_path / "cut.gguf")
    refused("cut.gguf", llamacpp.Model, tmp_path / "cut.gguf")
    refused("cut.gguf", llamacpp.quantize, tmp_path / "cut.gguf", tmp_path / "out.gguf", "Q4_0")
    refused("cut.gguf", llamacpp.plan, tmp_path / "cut.gguf", "Q4_0")
    assert os.listdir(tmp_path) == ["cut.gguf"]


def test_files_that_are_something_else(tmp_path, f32):
    for content in (b"GGUF", b"GGML" * 100, b"PK\x03\x04" + bytes(500), bytes(1000), b"\xff" * 1000):
        (tmp_path / "x.gguf").write_bytes(content)
        refused("x.gguf", llamacpp.Model, tmp_path / "x.gguf")
    data = bytearray(f32.read_bytes())
    data[4:8] = (3).to_bytes(4, "big")
    (tmp_path / "x.gguf").write_bytes(data)
    refused("big-endian", llamacpp.check_gguf, tmp_path / "x.gguf")
    refused("is a folder", llamacpp.Model, tmp_path)


def test_a_big_endian_file(tmp_path):
    """Written by the gguf package itself: every number in it is turned around, not only the version."""
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((32, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for function in (llamacpp.check_gguf, llamacpp.Model, llamacpp.tensor_table, llamacpp.bits_per_weight):
        refused("big-endian", function, tmp_path / "big.gguf")
    refused("big-endian", llamacpp.quantize, tmp_path / "big.gguf", tmp_path / "out.gguf", "Q4_0")


def set_tensor_type(path, target, tensor, number):
    """A copy of a GGUF file whose tensor table claims another type for one tensor."""
    data = bytearray(path.read_bytes())
    name = tensor.encode()
    at = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    dims = int.from_bytes(data[at : at + 4], "little")
    data[at + 4 + 8 * dims : at + 8 + 8 * dims] = number.to_bytes(4, "little")
    target.write_bytes(data)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [("Q8_0", 8), ("Q4_K", 12), ("IQ2_XXS", 16), ("unknown", 99), ("removed", 4)])
def test_a_row_that_does_not_fit_its_type(tmp_path, name, number):
    """100 columns are no whole number of blocks; a type that ggml does not have is refused for what it is."""
    llama = tiny_llama.model(layers=1, hidden_size=100, intermediate_size=192, num_attention_heads=2,
                             num_key_value_heads=1, head_dim=50)  # fmt: skip
    sound = gguf_export.export(llama, tmp_path / "sound.gguf", tokenizer=tiny_llama.tokenizer())
    assert llamacpp.check_gguf(sound)
    bad = set_tensor_type(sound, tmp_path / "bad.gguf", "blk.0.attn_q.weight", number)
    wanted = "do not divide 100 columns" if number not in (99, 4) else f"unknown type {number}"
    for function in (llamacpp.check_gguf, llamacpp.Model):
        refused(wanted, function, bad)
    refused(wanted, llamacpp.quantize, bad, tmp_path / "out.gguf", "Q8_0")
    refused(wanted, llamacpp.plan, bad, "Q8_0")


@pytest.mark.slow
def test_a_key_that_begins_with_a_zero_byte(q4, tmp_path):
    """In C it is an empty text, on which ggml aborts when it writes the quantized file's metadata."""
    data = bytearray(q4.read_bytes())
    at = data.index(b"general.size_label")
    data[at : at + 7] = bytes(7)
    (tmp_path / "zero.gguf").write_bytes(data)
    refused("ends the process", llamacpp.Model, tmp_path / "zero.gguf")
    refused("ends the process", llamacpp.quantize, tmp_path / "zero.gguf", tmp_path / "o.gguf", "Q4_0")


def damaged(data, header, rng):
    """One of seven kinds of damage, mostly in the header: what copying, editing and bad disks do to a file."""
    data, at = bytearray(data), int(rng.integers(0, header if rng.random() < 0.8 else len(data)))
    n = int(rng.integers(1, 40))
    match rng.integers(7):
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            del data[at:]
        case 2:
            data[at : at + n] = bytes(len(data[at : at + n]))
        case 3:
            data[at : at + 8] = b"\xff" * len(data[at : at + 8])
        case 4:
            del data[at : at + n]
        case 5:
            data[at:at] = data[at : at + n]
        case 6:
            data[at : at + 4] = data[at : at + 4][::-1]
    return data


@pytest.mark.slow
@needs_fork
def test_damaged_files(q4, f32, tmp_path, monkeypatch):
    """The process that runs this test is the one that would die."""
    monkeypatch.setattr(gguf_file.subprocess, "run", forked.run)
    refusals = 0
    for seed in range(154):
        source = (q4, f32)[seed % 2]
        rng = np.random.default_rng(seed)
        data = damaged(source.read_bytes(), llamacpp.check_gguf(source).data_offset, rng)
        (tmp_path / "damaged.gguf").write_bytes(data)
        refusals += not everything(tmp_path / "damaged.gguf", tmp_path)
    assert refusals > 80
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@needs_fork
def test_bit_flips_never_take_the_process_down(q4, tmp_path, monkeypatch):
    """Flips among counts, keys, hyper-parameters and the tensor table: refused in a sentence, or harmless."""
    monkeypatch.setattr(gguf_file.subprocess, "run", forked.run)
    data = q4.read_bytes()
    vocabulary = range(data.find(b"tokenizer.ggml.tokens") + 60, data.find(b"tokenizer.ggml.bos_token_id"))
    places = [i for i in range(llamacpp.check_gguf(q4).data_offset) if i not in vocabulary]
    rng = np.random.default_rng(0)
    alive = 0
    for place in [*range(24), *rng.choice(places, 160)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.integers(8)
        (tmp_path / "flipped.gguf").write_bytes(flipped)
        alive += everything(tmp_path / "flipped.gguf", tmp_path)
        assert not list(tmp_path.glob("*.partial"))
    assert 0 < alive < 100


def test_nan_in_the_weights_of_a_file(f32, tmp_path):
    data = bytearray(f32.read_bytes())
    tensor = next(t for t in llamacpp.check_gguf(f32).tensors if "ffn_up" in t.name)
    data[tensor.offset + 4 : tensor.offset + 8] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(data)
    refused("nan.gguf", llamacpp.Model, tmp_path / "nan.gguf")
    refused("nan.gguf", llamacpp.quantize, tmp_path / "nan.gguf", tmp_path / "out.gguf", "Q4_0")
    assert os.listdir(tmp_path) == ["nan.gguf"]


def test_another_architecture_is_tried_in_a_child_process_first(f32, tmp_path):
    """Renamed to an architecture whose hyper-parameters are absent: llama.cpp refuses, in the child."""
    data = f32.read_bytes()
    key = b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little")
    (tmp_path / "other.gguf").write_bytes(data.replace(key + b"llama", key + b"qwen2"))
    refused("other.gguf", llamacpp.Model, tmp_path / "other.gguf")


def test_tools_and_availability(monkeypatch):
    ok, reason = llamacpp.available()
    assert ok and "0.3" in reason
    refused("not installed", llamacpp.tool, "llama-no-such-program")
    assert 1 <= llamacpp.n_threads() <= os.cpu_count()


def test_a_missing_library_is_one_sentence(tmp_path):
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('Failed to load shared library')")
    code = "from qtutor import llamacpp; ok, why = llamacpp.available(); print(ok, why)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.startswith("False llama-cpp-python does not load here") and out.returncode == 0


def test_a_copy_elsewhere_works_with_an_unusual_name(f32, tmp_path):
    path = tmp_path / "modèle 模型.gguf"
    shutil.copy(f32, path)
    done = llamacpp.quantize(path, tmp_path / "sortie é.gguf", "Q8_0")
    with llamacpp.Model(done, ctx=16) as model:
        assert model.logits([1]).shape == (1, 512)


def test_the_first_model_computes_in_a_child_first(q4, f32, monkeypatch):
    """A build that ends the process (a CUDA build did, and AMX wrongly compiled): the kernel lives and says so."""
    monkeypatch.setattr(gguf_file, "computed", {False})
    ended = subprocess.CompletedProcess([], -signal.SIGILL, b"")
    monkeypatch.setattr(gguf_file.subprocess, "run", lambda *args, **kwargs: ended)
    with llamacpp.Model(f32, ctx=32) as model:
        assert np.isfinite(model.logits(range(32))).all()
    refused("does not run on this processor", llamacpp.Model, q4)
    refused("does not run on this processor", llamacpp.run_tool, "llama-quantize")
    assert gguf_file.computed == {False}


def test_a_tool_whose_answer_is_missing_is_asked_again(tmp_path, monkeypatch):
    said = tmp_path / "said"
    (tmp_path / "tool").write_text(f"#!/bin/sh\ntest -e {said} && echo answer 42 || touch {said}\n")
    (tmp_path / "tool").chmod(0o755)
    monkeypatch.setattr(llamacpp, "tool", lambda name: tmp_path / name)
    assert llamacpp.run_tool("tool", until="answer [0-9]+\n")[0] == "answer 42\n"
    refused("did not print 'other' in 3 runs", llamacpp.run_tool, "tool", until="other", tries=3)
