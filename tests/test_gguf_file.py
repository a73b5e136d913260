"""gguf_file against the gguf package; which files a child looks at, and when.  Damaged files: test_llamacpp."""

import shutil

import gguf
import pytest
import tiny_llama

from qtutor import QtutorError, gguf_export, gguf_file, llamacpp

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


@pytest.fixture(scope="module")
def f32(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return gguf_export.export(tiny_llama.model(layers=2, intermediate_size=256), path, tokenizer=tiny_llama.tokenizer())


@pytest.fixture(scope="module")
def q4(f32):
    return llamacpp.quantize(f32, f32.with_name("tiny-q4.gguf"), "Q4_K_M")


def refused(match, function, *args):
    with pytest.raises(QtutorError, match=match):
        function(*args)


def test_table_of_types():
    assert gguf_file.GGML["Q4_K"] == (12, 256, 144) and gguf_file.GGML["Q2_0"] == (42, 64, 18)
    assert llamacpp.TYPES["Q4_K_M"].bpw == 4.5 and llamacpp.TYPES["Q6_K"].bpw == 6.5625
    assert llamacpp.TYPES["IQ3_M"].base == "IQ3_S" and llamacpp.TYPES["IQ2_S"].base == "IQ2_XS"
    assert llamacpp.TYPES["IQ2_XS"].needs_imatrix and not llamacpp.TYPES["IQ4_XS"].needs_imatrix
    assert llamacpp.file_type("q4_k").name == "Q4_K_M"


def test_check_gguf_reads_what_the_gguf_package_reads(q4):
    ours, reader = llamacpp.check_gguf(q4), gguf.GGUFReader(q4)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == theirs
    assert [t.offset for t in ours.tensors] == [t.data_offset for t in reader.tensors]


def test_lists_of_every_kind_are_read_as_the_gguf_package_reads_them(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "lists.gguf", "llama")
    lists = {"i": [1, -2, 3], "f": [1.5, 2.5], "b": [True, False], "s": ["ä", "", "🙂" * 300], "one": [7]}
    for name, values in lists.items():
        writer.add_array(f"list.{name}", values)
    writer.add_string("after", "still in step")
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    theirs = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "lists.gguf").fields.items() if k[:5] != "GGUF."}
    assert gguf_file.read(tmp_path / "lists.gguf").metadata == theirs and theirs["list.s"][1] == ""


def test_truncated_at_every_byte_of_the_header(q4, tmp_path):
    data, header = q4.read_bytes(), llamacpp.check_gguf(q4).data_offset
    for end in [*range(1, 600), *range(600, header, 97), len(data) - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        with pytest.raises((ValueError, IndexError)):
            gguf_file.read(tmp_path / "cut.gguf")


def test_a_file_that_keeps_its_reader_busy(f32, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "SECONDS", 0.01)
    shutil.copy(f32, tmp_path / "slow.gguf")
    refused("busy", llamacpp.check_gguf, tmp_path / "slow.gguf")


def test_a_file_is_looked_at_once_and_again_when_it_changes(f32, tmp_path, monkeypatch):
    looked, look = [], gguf_file._look_first
    monkeypatch.setattr(gguf_file, "_look_first", lambda path: looked.append(path) or look(path))
    shutil.copy(f32, tmp_path / "m.gguf")
    assert llamacpp.check_gguf(tmp_path / "m.gguf") is llamacpp.check_gguf(tmp_path / "m.gguf")
    assert llamacpp.bits_per_weight(llamacpp.quantize(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q8_0")) > 8
    assert looked == [tmp_path / "m.gguf"]  # what quantize() wrote is trusted
    (tmp_path / "q.gguf").write_bytes((tmp_path / "q.gguf").read_bytes()[:5000])
    refused("q.gguf", llamacpp.check_gguf, tmp_path / "q.gguf")
