"""What readers do wrong, done to a real Jupyter kernel: one clear sentence each, the kernel alive, nothing left over.

Every case is a cell.  The kernel is one process for the whole file, so a native crash (a damaged GGUF in
llama.cpp, say) shows at once: the cell after it gets no answer.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

TESTS = Path(__file__).resolve().parent

PREPARE = f"""
import os, shutil, sys, math, json, logging
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
import numpy as np, torch
import qtutor
from qtutor import corpus, course_model, evaluate, fake_quant, formats, gguf_export, llamacpp, packed, results
import tiny_llama
torch.manual_seed(0)
tiny_llama.save("model")
gguf_export.export("model", "sound.gguf")
llamacpp.quantize("sound.gguf", "q4.gguf", "Q4_0")
Path("a_file").write_text("not a folder")
nan = float("nan")

def damaged_model(change, file="model.safetensors"):
    shutil.rmtree("damaged", ignore_errors=True)
    shutil.copytree("model", "damaged")
    path = Path("damaged", file)
    change(path)
    return "damaged"

def damaged_gguf(change, source="sound.gguf"):
    shutil.copy(source, "damaged.gguf")
    change(Path("damaged.gguf"))
    return "damaged.gguf"

def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])

def flip(path, byte, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)

def with_nan(path):
    from safetensors.torch import load_file, save_file
    state = load_file(path)
    name = next(iter(state))
    state[name].view(-1)[3] = nan
    save_file(state, path, metadata=dict(format="pt"))

def big_endian():
    import gguf
    writer = gguf.GGUFWriter("big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((32, 256), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return "big.gguf"

def as_q4_k(path):
    # a matrix of 256 x 256 becomes one of 240 columns and more rows, which no block of 256 divides
    data, name = bytearray(path.read_bytes()), b"blk.0.attn_q.weight"
    at = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4
    data[at : at + 8], data[at + 16 : at + 20] = (240).to_bytes(8, "little"), (12).to_bytes(4, "little")
    path.write_bytes(data)

def use(folder):
    os.environ["QTUTOR_MODEL"] = str(Path(folder).absolute()) if Path(folder).exists() else str(folder)
"""

# name -> (cell, what the sentence must contain)
CASES = {
    # odd shapes and values
    "group does not divide": ("formats.quantize(torch.randn(4, 33), formats.INT4, granularity='group', group_size=32)",
                              "33|32"),
    "NaN in quantize": ("formats.quantize(torch.tensor([1.0, nan]), formats.E4M3)", "NaN"),
    "NaN in round_to": ("formats.round_to(torch.tensor([nan]), formats.E2M1)", "NaN"),
    "NaN in mxfp8": ("formats.mxfp8(torch.full((1, 32), nan))", "NaN"),
    "NaN in nvfp4": ("formats.nvfp4(torch.full((1, 32), nan))", "NaN"),
    "odd row in mxfp4": ("formats.mxfp4(torch.randn(3, 31))", "32"),
    "odd row in nvfp4": ("formats.nvfp4(torch.randn(3, 17))", "16"),
    "unknown granularity": ("formats.quantize(torch.randn(4, 32), formats.INT8, granularity='row')", "granularity"),
    "prepare, odd group": ("fake_quant.prepare(torch.nn.Sequential(torch.nn.Linear(30, 4)), 'int4', group_size=32)",
                           "30"),
    "prepare, no such type": ("fake_quant.prepare(torch.nn.Sequential(torch.nn.Linear(32, 4)), 'int99')", "int99"),
    "prepare, nothing to do": ("fake_quant.prepare(torch.nn.Sequential(torch.nn.ReLU()))", "Linear"),
    "convert, nothing to do": ("packed.convert(torch.nn.Sequential(torch.nn.Linear(32, 4)))", "prepare"),
    "compare different shapes": ("evaluate.compare(torch.randn(8, 16), torch.randn(8, 17), torch.zeros(8).long())", ""),
    "compare NaN logits": ("evaluate.compare(torch.full((8, 16), nan), torch.randn(8, 16), torch.zeros(8).long())",
                           "NaN|finite"),
    "perplexity of nothing": ("evaluate.perplexity(lambda ids: torch.zeros(len(ids), 8), [], ctx=16)", ""),
    "profile": ("os.environ['QTUTOR_PROFILE'] = 'huge'; qtutor.pick(quick=1, full=2)", "QTUTOR_PROFILE"),
    # models
    "missing model": ("use('/nowhere/model'); course_model.load()", "QTUTOR_MODEL"),
    "missing tokenizer": ("use('/nowhere/model'); course_model.load_tokenizer()", "QTUTOR_MODEL"),
    "a file as model": ("use('a_file'); course_model.load()", "QTUTOR_MODEL"),
    "truncated safetensors": ("use(damaged_model(cut)); course_model.load()", "damaged|truncated"),
    "empty safetensors": ("use(damaged_model(lambda p: p.write_bytes(b''))); course_model.load()", "damaged|truncated"),
    "bit flip in the header's length": ("use(damaged_model(lambda p: flip(p, 2, 6))); course_model.load()", "damaged"),
    "bit flip in the header": ("use(damaged_model(lambda p: flip(p, 9, 2))); course_model.load()", ""),
    "NaN in safetensors": ("use(damaged_model(with_nan)); course_model.load()", "finite|NaN"),
    "truncated config": ("use(damaged_model(cut, 'config.json')); course_model.load()", "config.json"),
    "truncated tokenizer": ("use(damaged_model(cut, 'tokenizer.json')); course_model.load_tokenizer()", "tokenizer"),
    "export, missing model": ("gguf_export.export('/nowhere/model', 'out.gguf')", ""),
    "export, truncated": ("gguf_export.export(damaged_model(cut), 'out.gguf')", "damaged|truncated|safetensors"),
    "export, NaN": ("gguf_export.export(damaged_model(with_nan), 'out.gguf')", "NaN"),
    "export under a file": ("gguf_export.export('model', 'a_file/out.gguf')", "cannot be written"),
    # GGUF files
    "missing GGUF": ("llamacpp.Model('nowhere.gguf')", "nowhere.gguf"),
    "not a GGUF": ("llamacpp.Model('a_file')", "a_file"),
    "truncated GGUF": ("llamacpp.Model(damaged_gguf(cut))", "truncated|damaged|early"),
    "truncated header": ("llamacpp.Model(damaged_gguf(lambda p: cut(p, 0.001)))", "truncated|damaged|early"),
    "truncated, quantize": ("llamacpp.quantize(damaged_gguf(cut), 'out.gguf', 'Q4_0')", "truncated|damaged|early"),
    "bit flip in the magic": ("llamacpp.Model(damaged_gguf(lambda p: flip(p, 0)))", "GGUF"),
    "bit flip in the tensor count": ("llamacpp.Model(damaged_gguf(lambda p: flip(p, 8, 1)))", "damaged.gguf"),
    "big-endian GGUF": ("llamacpp.Model(big_endian())", "big-endian"),
    "big-endian, quantize": ("llamacpp.quantize(big_endian(), 'out.gguf', 'Q4_0')", "big-endian"),
    "row that does not fit its type": ("llamacpp.Model(damaged_gguf(as_q4_k))", "blocks of 256 do not divide"),
    "row does not fit, quantize": ("llamacpp.quantize(damaged_gguf(as_q4_k), 'out.gguf', 'Q8_0')",
                                   "blocks of 256 do not divide"),
    "quantize twice, by a dry run's name": ("llamacpp.quantize('q4.gguf', 'out.gguf', 'Q8_0')", "already quantized"),
    "server of a damaged file": ("from qtutor import serve; serve.llama_server(damaged_gguf(cut)).start()",
                                 "truncated|damaged|early"),
    "server that cannot start": ("from qtutor import serve; serve.llama_server('q4.gguf', timeout=0.01).start()",
                                 "did not start"),
    "quantize under a file": ("llamacpp.quantize('sound.gguf', 'a_file/out.gguf', 'Q4_0')", "cannot be written"),
    "quantize twice": ("llamacpp.quantize('q4.gguf', 'out.gguf', 'Q4_K_M')", "already quantized"),
    "no such type": ("llamacpp.quantize('sound.gguf', 'out.gguf', 'Q9_K')", "Q9_K"),
    "no importance matrix": ("llamacpp.quantize('sound.gguf', 'out.gguf', 'IQ2_XS')", "importance matrix"),
    "another model's matrix": ("llamacpp.quantize('sound.gguf', 'out.gguf', 'Q4_K_M', "
                               "imatrix={'blk.0.attn_q.weight': np.ones(7, np.float32)})", "importance matrix"),
    "token beyond the vocabulary": ("with llamacpp.Model('q4.gguf') as m: m.logits([10**6])", ""),
    "more tokens than the context": ("with llamacpp.Model('q4.gguf', ctx=16) as m: m.logits([1] * 40)", "16"),
    "closed model": ("m = llamacpp.Model('q4.gguf'); m.close(); m.logits([1, 2])", "clos"),
    # places that cannot be written
    "unwritable cache": ("os.environ['QTUTOR_CACHE'] = 'a_file/cache'; corpus.train_documents()", "QTUTOR_CACHE"),
    "results under a file": ("results.save('demo', [dict(a=1)], directory='a_file/results')", ""),
    "results that are not there": ("results.load('no_such_result', machine='cpu')", "no_such_result"),
}

FUZZ = """
source, seed, places = {source!r}, {seed}, {places}
rng = np.random.default_rng(seed)
data = Path(source).read_bytes()
told = 0
for _ in range(20):
    at = int(rng.integers(0, places or len(data)))
    damaged_gguf(lambda path: flip(path, at, int(rng.integers(8))), source)
    try:
        with llamacpp.Model("damaged.gguf", ctx=16) as model:
            model.logits([1, 2, 3])
    except qtutor.QtutorError as error:
        assert "\\n" not in str(error), error
        told += 1
print("told", told)
"""


class Kernel:
    """A kernel in a folder of its own, prepared by PREPARE; ``run`` returns (error name, message) or None."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.start()

    def start(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(self.folder))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=300)
        self.printed = ""
        error = self.run(PREPARE, timeout=300)
        assert error is None, error

    def run(self, cell: str, timeout: float = 300) -> tuple[str, str] | None:
        self.printed = ""

        def hear(message):
            if message["msg_type"] == "stream":
                self.printed += message["content"]["text"]

        reply = self.client.execute_interactive(cell, timeout=timeout, output_hook=hear)["content"]
        return None if reply["status"] == "ok" else (reply["ename"], reply["evalue"])

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    kernel = Kernel(tmp_path_factory.mktemp("reader"))
    yield kernel
    kernel.stop()


@pytest.fixture(autouse=True)
def clean(kernel):
    """The environment as it was, and a new kernel where the last case ended the old one."""
    if not kernel.manager.is_alive():
        kernel.start()
    kernel.run("for name in ('QTUTOR_MODEL', 'QTUTOR_CACHE'): os.environ.pop(name, None)\n"
               "os.environ['QTUTOR_PROFILE'] = 'quick'")


def still_alive(kernel: Kernel) -> None:
    assert kernel.run("print(6 * 7)", timeout=300) is None and kernel.printed.strip() == "42"
    assert kernel.manager.is_alive()
    assert not list(kernel.folder.rglob("*.partial*")), "a partial file was left behind"
    assert not (kernel.folder / "out.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_the_kernel_lives(kernel, case):
    cell, wanted = CASES[case]
    error = kernel.run(cell)
    assert error is not None, "it was accepted"
    name, message = error
    assert name == "QtutorError", f"{name}: {message}"
    assert "\n" not in message and message.endswith(".") and 25 < len(message) < 400, message
    assert not message.startswith("\x1b") and re.search(wanted, message), message
    # "one clear sentence that says what to do": an imperative after the colon, or one in the sentence
    does = r"(use|set|give|choose|pass|call|restore|download|export|quantize|compute|check|unset|run|find|free|look|" \
           r"open|make|train|save|clip|replace|remove|mask|pad|drop|name|cut|copy|load|write|must|needs|reload|pick|" \
           r"evaluate|reshape|install)"
    assert re.search(rf"\b{does}\b", message, re.I), message
    still_alive(kernel)


@pytest.mark.parametrize("shape", [(3, 32), (16, 40)])
def test_odd_shapes_in_fp8_say_what_the_hardware_wants(kernel, shape):
    """The emulation raises what Transformer Engine raises, in its words, so that readers can look them up."""
    error = kernel.run(f"""
from qtutor import te_switch
te_switch.activate()
import transformer_engine.pytorch as engine
with engine.autocast(enabled=True):
    engine.Linear({shape[1]}, 32)(torch.randn{shape})
""")
    assert error is not None and "\n" not in error[1]
    assert "divisible by 8" in error[1] and "divisible by 16" in error[1] and str(list(shape)) in error[1]
    still_alive(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["sound.gguf", "q4.gguf"])
@pytest.mark.parametrize("where", ["header", "anywhere"])
def test_random_bit_flips_never_end_the_kernel(kernel, source, where):
    """Refused in a sentence, or harmless; never a dead kernel."""
    places = 4096 if where == "header" else 0
    error = kernel.run(FUZZ.format(source=source, seed=7, places=places), timeout=500)
    assert error is None, error
    if where == "header":
        assert int(kernel.printed.split()[-1]) > 0, "no flip in the header was noticed"
    still_alive(kernel)


def test_sound_files_still_work(kernel):
    """The same kernel, after all of that."""
    assert kernel.run("with llamacpp.Model('q4.gguf', ctx=32) as m: print(m.logits([1, 2, 3]).shape)") is None
    assert kernel.printed.strip() == "(3, 512)"
    assert kernel.run("use('model'); course_model.load(); course_model.load_tokenizer()") is None, sys.exc_info()
