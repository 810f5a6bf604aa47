"""The queues that MLX gives each thread for its work on a device."""

from __future__ import annotations


def end_device_streams() -> None:
    """Finish and give up the calling thread's queues.

    A thread that used MLX calls this before it ends; else the process may abort when it exits.
    """
    import mlx.core as mx

    mx.clear_streams()
