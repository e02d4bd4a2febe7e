"""A page about runs.

fedpeat report DIR [DIR ...]
"""

from __future__ import annotations


def main(arguments: list[str], called: str) -> int:
    """Do what `python -m analysis report` does with these words; returns the exit status."""
    from analysis.__main__ import main  # with pandas and what draws

    return main(["report", *arguments], called.removesuffix(" report"))
