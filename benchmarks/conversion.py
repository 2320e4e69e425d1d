"""What does converting OASIS-1 cost, and does it survive being killed?

``make bench`` makes an archive like one of OASIS's discs from phantoms (40 subjects with their raw
scans, which conversion has to pass), converts it in a fresh process, and measures seconds and peak
memory of that process. Then a smaller disc is converted ten times: killed with ``kill -9`` at a random
moment (seed 0), run again, and compared byte by byte with an uninterrupted conversion.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import measured

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from oasis_like import phantom_volume, subject_files  # noqa: E402

RESULT = HERE / "conversion.json"
SUBJECTS, FEW, KILLS = 40, 8, 10


def make_disc(path: Path, cases: int) -> int:
    """Write the archive; its unpacked size in bytes."""
    head, labels = phantom_volume()
    raw = np.concatenate([head, head], axis=2)[:, :, :256].astype(">i2").tobytes()  # 18 MB, as a raw scan has
    total = 0
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for case in range(1, cases + 1):
            files = subject_files(case, head, labels)
            files |= {f"OAS1_{case:04d}_MR1/RAW/mpr-{i}.img": raw for i in (1, 2, 3)}
            for name, content in files.items():
                entry = tarfile.TarInfo(f"disc1/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
                total += len(content)
    return total


def command(disc: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "oasis_helpers", "convert", str(disc), str(out)]


def digest(root: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        found.update(path.relative_to(root).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def main() -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as folder:
        disc, few = Path(folder) / "disc1.tar.gz", Path(folder) / "disc2.tar.gz"
        unpacked = make_disc(disc, SUBJECTS)
        make_disc(few, FEW)
        code, seconds, megabytes = measured(command(disc, Path(folder) / "all"), **quiet)
        assert code == 0
        result = {
            "subjects": SUBJECTS,
            "archive, MB": disc.stat().st_size / 1e6,
            "unpacked, MB": unpacked / 1e6,
            "seconds": seconds,
            "peak memory, MB": megabytes,
        }
        _, whole, _ = measured(command(few, Path(folder) / "whole"), **quiet)
        moments = np.random.default_rng(0).uniform(0.5, whole, KILLS)
        noted, equal = [], []
        for number, moment in enumerate(moments):
            out = Path(folder) / f"killed-{number}"
            process = subprocess.Popen(command(few, out), **quiet)
            time.sleep(moment)
            process.kill()
            process.wait()
            table = out / "conversion.csv"
            noted.append(len(table.read_text().splitlines()) - 1 if table.exists() else 0)
            subprocess.run(command(few, out), check=True, **quiet)
            equal.append(digest(out) == digest(Path(folder) / "whole"))
        result["killed after s"] = [round(float(moment), 1) for moment in moments]
        result[f"cases whole after the kill, of {FEW}"] = noted
        result["equal to an uninterrupted conversion"] = f"{sum(equal)} of {KILLS}"
    for name, value in result.items():
        print(f"{name:<30} {value:10.1f}" if isinstance(value, float) else f"{name:<30} {value!s:>10}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
