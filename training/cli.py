"""The ``dmm`` command: each subcommand is a thin face on a function that the nodes call too."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import torch

from .commands import cache, convert, demo, distill, evaluate, fewstep, info, learn, merge, mixing, sample, thumbnails
from .parallel.ranks import AgreedError, LostProcess, Ranks, in_words, launched


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error that was explained, 130 when interrupted (Ctrl-C, SIGTERM)."""
    ranks = launched()
    logging.basicConfig(level=logging.INFO if ranks.is_main else logging.WARNING, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log has it in order with what goes to stderr
    kept = KEPT
    try:
        try:
            args = parser().parse_args(argv)
            kept = getattr(args, "kept", KEPT)
            if args.threads:
                torch.set_num_threads(args.threads)
            with interruptible():
                args.run(args)
        finally:
            sys.stdout.flush()  # after --help too
    except BrokenPipeError:  # as with `dmm ... | head`: whoever read it has seen enough
        silence()
        return 1
    except LostProcess as error:
        if error.speak:
            print(f"\n{who(ranks)}: {error}", file=sys.stderr)  # a progress bar may be in this line
        return 1
    except ValueError as error:
        if ranks.is_main or not isinstance(error, AgreedError):
            print(f"{who(ranks)}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{who(ranks)}: {in_words(error)}", file=sys.stderr)
        return 1
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        first = (str(error).splitlines() or ["no more to be had"])[0]
        print(f"{who(ranks)}: out of memory ({first}): see the setting 'memory' in docs/training.md", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if ranks.is_main:
            print(f"\ndmm: interrupted; {kept}", file=sys.stderr)  # a progress bar may be in this line
        return 130
    return 0


KEPT = "what is done is kept, the same command goes on from there"
"""After an interrupt, of commands that do not say something else (``set_defaults(kept=...)``)."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM interrupts as Ctrl-C does: at once, so that what is half written is removed. Main thread only; else nothing."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def silence() -> None:
    """Send what is still to be said nowhere, or Python complains once more at its end about a pipe that nobody reads."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


def who(ranks: Ranks) -> str:
    """Who speaks, for messages."""
    return "dmm" if ranks.is_main else f"dmm, process {ranks.rank}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dmm", description="Distil many Stable Diffusion checkpoints into one, and paint with it."
    )
    top.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    commands = top.add_subparsers(required=True, metavar="command")
    distill.add_parsers(commands)
    fewstep.add_parser(commands)
    cache.add_parsers(commands)
    merge.add_parser(commands)
    learn.add_parsers(commands)
    sample.add_parser(commands)
    thumbnails.add_parser(commands)
    info.add_parser(commands)
    convert.add_parser(commands)
    evaluate.add_parser(commands)
    mixing.add_parser(commands)
    demo.add_parsers(commands)
    return top


def leave(status: int) -> NoReturn:
    """End the process. One of several ends at once: torch's threads of a connection that is closed already sometimes abort the
    interpreter's own way out ("terminate called without an active exception", torch 2.11 with FSDP2 on the CPU), and the launcher would
    report a run as failed whose files are all written."""
    if launched().world == 1:
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
