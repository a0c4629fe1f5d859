"""The table of kinds (``kinds.py``) against the tests that it names."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .kinds import KINDS, MENDED, READ, REFUSED, table

TESTS = Path(__file__).parents[1]


def test_the_table_is_complete_and_printed():
    counts = Counter(kind.outcome for kind in KINDS)
    print(f"{table()}\n\n{len(KINDS)} kinds: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    assert counts.keys() == {READ, REFUSED, MENDED}
    assert len({kind.what for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
def test_the_test_of_a_kind_is_there(kind):
    """And, where the row has the words of a message, its file expects them."""
    file, _, name = kind.test.partition("::")
    source = (TESTS / file).read_text(encoding="utf-8")
    functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{file} has no {name}"
    if kind.outcome != READ:
        assert kind.expected in source or "same weights" in kind.expected, f"{file} expects no '{kind.expected}'"


@pytest.mark.slow
def test_every_kind_passes_its_test():
    """Each on its own, without the ones that need the host (``tests/host`` runs those)."""
    tests = sorted({str(TESTS / kind.test) for kind in KINDS if not kind.test.startswith("host/")})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    print(done.stdout.strip().splitlines()[-1])
