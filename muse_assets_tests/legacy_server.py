"""The unchanging search server in miniature: `python legacy_server.py SERVER_DIR REQUEST.json`.

Here: what the server does with its files, in its own environment (faiss-cpu 1.11.0.post1, numpy). It
imports nothing of this project. A request is a list of {"index", "queries": .npy file of (n, d) float32,
"k", "playlist": FAISS ids}; the answer is one JSON document on standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np

PROGRAM_NPROBE = 100


def load(server: Path, name: str) -> tuple[str, Any]:
    """The live file, or the backup beside it if that fails, as the server does at start."""
    for file in (f"muse_{name}.index", f"muse_{name}_backup.index"):
        try:
            return file, faiss.read_index(str(server / file))
        except RuntimeError as error:
            print(f"{file}: {error}", file=sys.stderr)
    raise SystemExit(f"no file of {name} can be loaded")


def found(index: Any, queries: Any, k: int, parameters: Any = None) -> dict[str, Any]:
    """ids and squared L2 distances, both (n, k)."""
    distances, ids = index.search(queries, k, params=parameters)
    return {"ids": ids.tolist(), "distances": distances.tolist()}


def answer(server: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One index's answers: plain, and within the playlist."""
    file, index = load(server, request["index"])
    queries = np.load(request["queries"], allow_pickle=False)
    playlist = np.array([i for i in request["playlist"] if 0 <= i < index.ntotal], dtype=np.int64)
    within = faiss.SearchParametersIVF(
        nprobe=max(index.nprobe, PROGRAM_NPROBE), sel=faiss.IDSelectorBatch(playlist)
    )
    return {
        "file": file,
        "class": type(index).__name__,
        "ntotal": index.ntotal,
        "nprobe": index.nprobe,
        "d": index.d,
        "metric": index.metric_type,
        "allowed": len(playlist),
        "plain": found(index, queries, request["k"]),
        "playlist": found(index, queries, request["k"], within),
    }


def main() -> None:
    """Answer every request of the file."""
    server, requests = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
    answers = {request["index"]: answer(server, request) for request in requests}
    print(json.dumps({"faiss": faiss.__version__, "answers": answers}))


if __name__ == "__main__":
    main()
