"""llamacpp_source: what of a source distribution is unpacked and where, once; and what is said without a network."""

import io
import subprocess
import sys
import tarfile

import pytest

from qtutor import QtutorError
from qtutor.checkpoints import convert
from tools import llamacpp_source

WANTED = [
    "LICENSE", "convert_hf_to_gguf.py", "conversion/__init__.py", "conversion/llama.py", "gguf-py/LICENSE",
    "gguf-py/gguf/__init__.py", "gguf-py/gguf/vocab.py",
]  # fmt: skip
VOCABULARIES = ["models/ggml-vocab-llama-spm.gguf", "models/ggml-vocab-qwen2.gguf.inp"]
LEFT = [
    "models/ggml-vocab-aquila.gguf", "convert_lora_to_gguf.py", "gguf-py/gguf/scripts/gguf_dump.py", "src/llama.cpp",
    "conversion/../../../escape.py", "gguf-py/tests/test.py",
]  # fmt: skip


def source(path, names=(*WANTED, *VOCABULARIES, *LEFT)):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(f"llama_cpp_python-1.2.3/vendor/llama.cpp/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def found(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("vocabularies", [False, True])
def test_what_is_unpacked(tmp_path, vocabularies):
    target = tmp_path / "bin" / "llama.cpp"
    target.mkdir(parents=True)
    (target / "old.py").write_text("of another version")
    archive = source(tmp_path / "s.tar.gz")
    size = llamacpp_source.unpack(archive, target, "1.2.3", vocabularies)
    wanted = [*WANTED, *VOCABULARIES * vocabularies]
    assert found(target) == sorted([*wanted, "VERSION"]) and size == sum(map(len, wanted))
    assert (target / "conversion" / "llama.py").read_text() == "conversion/llama.py"
    assert found(tmp_path / "bin") == [f"llama.cpp/{name}" for name in found(target)]  # and nothing beside it


def test_another_archive_leaves_what_is_there(tmp_path):
    target = tmp_path / "llama.cpp"
    target.mkdir()
    (target / "kept").write_text("")
    with pytest.raises(QtutorError, match="holds no convert_hf_to_gguf.py"):
        llamacpp_source.unpack(source(tmp_path / "s.tar.gz", LEFT), target, "1", True)
    assert found(target) == ["kept"]


def test_done_twice_is_no_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "folder", lambda: tmp_path / "llama.cpp")
    monkeypatch.setattr(llamacpp_source.metadata, "version", lambda name: "1.2.3")
    asked = []
    monkeypatch.setattr(llamacpp_source, "download", lambda v, folder: asked.append(v) or source(folder / "s"))
    for arguments, times in (([], 1), ([], 1), (["--vocabularies"], 2), (["--vocabularies"], 2), ([], 2)):
        assert llamacpp_source.main(arguments) == 0 and asked == ["1.2.3"] * times
    assert "0 MB" in capsys.readouterr().out
    monkeypatch.setattr(llamacpp_source.metadata, "version", lambda name: "1.2.4")
    assert llamacpp_source.main([]) == 0 and asked[-1] == "1.2.4"


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    class Failed:
        stderr = "WARNING: Retrying\nERROR: No matching distribution found for llama-cpp-python==1.2.3\n"

    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or Failed())
    with pytest.raises(QtutorError, match="No matching distribution.*with a network") as info:
        llamacpp_source.download("1.2.3", tmp_path)
    assert "\n" not in str(info.value) and str(info.value).endswith(".")
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"] and "llama-cpp-python==1.2.3" in commands[0]


def test_a_damaged_archive_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "folder", lambda: tmp_path / "llama.cpp")

    def broken(version, folder):
        (folder / "s.tar.gz").write_bytes(b"no archive")
        return folder / "s.tar.gz"

    monkeypatch.setattr(llamacpp_source, "download", broken)
    with pytest.raises(QtutorError, match="could not be unpacked"):
        llamacpp_source.main([])
    assert not (tmp_path / "llama.cpp").exists()
