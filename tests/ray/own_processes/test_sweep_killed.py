"""Settings times seeds, side by side: what is killed in the middle ends as if it had not been."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable
from pathlib import Path

from processes import forked
from whole_runs import assert_same_bits

from workloads.sweep import main


def killed_after(number: int, arguments: list[str]) -> int:
    """The sweep, by a process that dies when so many runs are finished."""
    say = builtins.print

    def say_and_die(*words: object, **how: object) -> None:
        say(*words, **how)  # type: ignore[call-overload]
        if str(words[0] if words else "").startswith(f"{number}/"):
            os.kill(os.getpid(), signal.SIGKILL)

    builtins.print = say_and_die
    return main(arguments)


def test_a_sweep_killed_in_the_middle_and_resumed_ends_with_the_table_of_an_undisturbed_one(
    tiny_arguments: Callable[..., list[str]], tmp_path: Path, capsys, small_images
):
    def sweep(name: str, *hosts: object) -> list[str]:
        vary = ("--vary", "algorithm=fed-peft,fed-avg", "--seeds", 0, 1)
        return tiny_arguments("--out", tmp_path / name, "--rounds", 2, "--local.learning-rate", 1e-3, *vary, *hosts)

    assert main(sweep("undisturbed")) == 0
    said = tmp_path / "said"
    on_ray = sweep("killed", "--hosts.backend", "ray", "--hosts.num-hosts", 2)
    assert forked(said, said, killed_after, 1, on_ray) == -signal.SIGKILL, said.read_text()
    killed = tmp_path / "killed"
    finished = [path.parent for path in killed.glob("*/summary.json")]
    assert 1 <= len(finished) < 4 and not (killed / "table.md").exists()
    before = {path: (path / "summary.json").stat().st_mtime_ns for path in finished}
    assert main(sweep("killed")) == 0
    assert {path: (path / "summary.json").stat().st_mtime_ns for path in finished} == before, "nothing is repeated"
    for run in (tmp_path / "undisturbed").glob("*/"):
        assert_same_bits(run, killed / run.name)
    table = (killed / "table.md").read_text()
    assert table == (tmp_path / "undisturbed" / "table.md").read_text()
    assert "| fed-peft (2 seeds) | fed-avg (2 seeds) |" in table and (killed / "comparison.html").exists()


def test_a_setting_that_there_is_not_is_refused_with_one_line(tmp_path, capsys):
    for words, line in (
        (["--vary", "lora.rnk=1,2"], "error: there is no --lora.rnk: did you mean --lora.rank?"),
        (["--vary", "lora.rank=1,"], "error: vary = 'lora.rank=1,' is not allowed: SETTING=VALUE,VALUE…"),
        (["--vary", "lora.rank=1,0"], "error: lora.rank = 0 is not allowed: an integer of at least 1"),
        (
            ["--resume", "runs/x"],
            "error: resume = 'runs/x' is not allowed: unset: the same command goes on with a sweep",
        ),
    ):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr()
        assert said.err == line + "\n" and not said.out, "nothing was started"
    assert not (tmp_path / "out").exists()
