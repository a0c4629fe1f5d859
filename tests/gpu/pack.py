"""Prepares .gpu-pack, which is carried to a GPU machine without a network: ``make gpu-pack``.

    python -m comfyui_dmm.tests.gpu.pack                    (for Python 3.12)
    python -m comfyui_dmm.tests.gpu.pack --python 3.11      (for a rehearsal here)

In it: the wheels that wheels.txt names, packed anew with LZMA, which pip reads and which saves a third; and host.tar.xz, the source of the
ComfyUI of this machine (``find_host``) without tests, API nodes and files over --largest. What was left out is printed, and the size beside
what may travel together with the checkout.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from ...training.host_path import find_host

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu-pack"
LIST = Path(__file__).with_name("wheels.txt")
MAY_TRAVEL = 64 * 2**20
MIB = 2**20
GLIBC = (35, 34, 31, 28, 27, 24, 17, 12)
"""Of the tags manylinux_2_N that pip is to look for; it takes none that it is not told."""
LEFT_OUT = (
    "tests",
    "tests-unit",
    "blueprints",
    "comfy_api_nodes",
    "script_examples",
    "models",
    "output",
    "input",
    "temp",
    "user",
)
"""Top folders of the host that are not needed to paint; custom_nodes stays empty."""
NEEDED = ("comfy/sd1_tokenizer/",)


def wanted(host: Path | None) -> list[tuple[str, bool]]:
    """(what pip is asked for, whether the wheel without compiled code is wanted) of each line of the list."""
    asked = (host / "requirements.txt").read_text(encoding="utf-8").splitlines() if host else []
    found = []
    for line in LIST.read_text(encoding="utf-8").splitlines():
        name, *words = line.partition("#")[0].split() or [""]
        if name:
            exact = next((one.strip() for one in asked if re.match(rf"{re.escape(name)}\s*[=<>~]", one)), name)
            found.append((exact if "host" in words else name, "pure" in words))
    return found


def fetch(requirement: str, pure: bool, python: str, folder: Path) -> None:
    """Raises SystemExit with pip's words where no wheel fits."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    command += ["--python-version", python, "--disable-pip-version-check"]
    if pure:
        command += ["--implementation", "py", "--abi", "none", "--platform", "any"]
    else:
        tags = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
        command += ["--implementation", "cp", *(part for tag in tags for part in ("--platform", tag))]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip download {requirement}: {done.stderr.strip()[-600:]}")


def smaller(source: Path, target: Path) -> None:
    """The same wheel with LZMA instead of deflate, unless that is no gain."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as new:
        for one in old.infolist():
            new.writestr(one.filename, old.read(one), zipfile.ZIP_LZMA)
    if target.stat().st_size >= source.stat().st_size:
        shutil.copy(source, target)


def pack_host(host: Path, target: Path, largest: int) -> list[str]:
    """-> what was left out: top folders, and files of more than ``largest`` bytes."""
    out = [f"{name}/" for name in LEFT_OUT if (host / name).exists()]

    def kept(path: Path) -> bool:
        inside = path.relative_to(host)
        if (
            not path.is_file()
            or inside.parts[0] in (*LEFT_OUT, ".git", "custom_nodes")
            or "__pycache__" in inside.parts
        ):
            return False
        if path.stat().st_size > largest and not inside.as_posix().startswith(NEEDED):
            out.append(f"{inside.as_posix()} ({path.stat().st_size / MIB:.1f} MiB)")
            return False
        return True

    with tarfile.open(target, "w:xz") as archive:
        for path in sorted(host.rglob("*")):
            if kept(path):
                archive.add(path, Path("host") / path.relative_to(host), recursive=False)
    return out


def checkout_bytes() -> int:
    """Of the files that travel with any call: tracked ones, and others that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--largest", type=float, default=0.4, help="MiB of a file of the host's source that is taken")
    args = parser.parse_args()
    host = find_host()
    shutil.rmtree(args.folder, ignore_errors=True)
    wheels = args.folder / "wheels"
    wheels.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        for requirement, pure in wanted(host):
            fetch(requirement, pure, args.python, Path(temporary))
        for wheel in sorted(Path(temporary).iterdir()):
            smaller(wheel, wheels / wheel.name)
    if host is None:
        print("no ComfyUI found (COMFYUI_PATH): the pack is without a host, whose stages will not be possible")
    else:
        out = pack_host(host, args.folder / "host.tar.xz", int(args.largest * MIB))
        print(f"of the host left out: {', '.join(out)}")
    files = sorted((path for path in args.folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    for path in files:
        print(f"{path.stat().st_size / MIB:7.2f} MiB  {path.relative_to(args.folder)}")
    mine, checkout = sum(path.stat().st_size for path in files), checkout_bytes()
    print(f"pack {mine / MIB:.1f} MiB + checkout {checkout / MIB:.1f} MiB = {(mine + checkout) / MIB:.1f} of 64 MiB")
    if mine + checkout > MAY_TRAVEL:
        raise SystemExit("that is too much: lower --largest, or take lines out of tests/gpu/wheels.txt")


if __name__ == "__main__":
    main()
