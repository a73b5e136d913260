"""fetch: where a fetched model lies; how it gets there is tested in tools/test_fetch_model.py."""

from qtutor.checkpoints import fetch


def test_a_folder_counts_when_its_file_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUTOR_CACHE", str(tmp_path))
    assert fetch.folder() is None
    folder = tmp_path / "SmolLM2-135M-Instruct"
    folder.mkdir()
    assert fetch.folder() is None
    (folder / fetch.FILE).write_bytes(b"GGUF")
    assert fetch.folder() == folder
