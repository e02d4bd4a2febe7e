"""Files and folders that appear whole or not at all, whoever else writes beside them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fedpeat_ray.files import remove_unfinished, written_whole, written_whole_dir


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was flushed to disk, in order."""
    seen: list[Path] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return seen


def test_two_writers_of_one_file_do_not_meet_even_with_one_process_id(tmp_path):
    with written_whole(tmp_path / "file") as one, written_whole(tmp_path / "file") as two:
        assert one != two and one.parent == two.parent == tmp_path
        assert one.name.startswith(".") and two.name.startswith(".")
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one", "the last that was ready"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_flushed_and_so_is_the_name_it_is_moved_to(tmp_path, flushed):
    with written_whole(tmp_path / "file") as part:
        part.write_text("text")
    assert flushed == [part, tmp_path]


def test_a_folder_is_flushed_with_all_it_holds_and_so_is_its_name(tmp_path, flushed):
    with written_whole_dir(tmp_path / "folder") as part:
        (part / "deep").mkdir()
        (part / "deep" / "file").write_text("text")
    assert set(flushed[:-1]) == {part, part / "deep", part / "deep" / "file"} and flushed[-1] == tmp_path
    assert (tmp_path / "folder" / "deep" / "file").read_text() == "text"


def test_a_folder_takes_the_place_of_an_older_one_whole(tmp_path):
    for name in ("old", "new"):
        with written_whole_dir(tmp_path / "folder") as part:
            (part / name).touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    with pytest.raises(ZeroDivisionError), written_whole_dir(tmp_path / "folder") as part:
        (part / "broken").touch()
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_permissions_are_those_the_person_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "file") as part:
            part.write_text("text")
        with written_whole_dir(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    for target in ("config.json", "rounds"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", end)
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
            whole = written_whole_dir if target == "rounds" else written_whole
            with pytest.raises(KeyboardInterrupt), whole(tmp_path / target) as part:
                (part / "file" if target == "rounds" else part).write_text("half")
    assert len(list(tmp_path.iterdir())) == 2, "nothing was left: the test tests nothing"
    for own in (".hidden", ".notes.tmp", "visible.tmp"):
        (tmp_path / own).touch()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", ".notes.tmp", "visible.tmp"}
    remove_unfinished(tmp_path / "none")
