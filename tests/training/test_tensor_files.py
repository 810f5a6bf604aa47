"""Files of weights and labels, written by several processes."""

from __future__ import annotations

import threading
from pathlib import Path

import mlx.core as mx

from mlxroute.training.tensor_files import write_tensors


def test_two_writers_of_a_head_do_not_disturb_each_other(tmp_path: Path) -> None:
    file, errors = tmp_path / "h.safetensors", []

    def write(value: float) -> None:
        try:
            for _ in range(100):
                write_tensors(file, {"a": mx.full((1_000,), value)}, {})
        except OSError as exc:
            errors.append(exc)

    threads = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    assert arrays["a"].sum().item() in {1_000.0, 2_000.0}
    assert list(tmp_path.iterdir()) == [file]
