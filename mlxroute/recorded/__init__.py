"""The large model's tokens and answers, recorded on disk; used by `bench` and `training`."""
