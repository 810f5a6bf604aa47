"""The list of commands, each of which is imported and made only when it is called.

`mlxroute --help` and `--version` then need no module of a command, nor the options of any.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

import typer

from mlxroute.cli.help_format import HelpCommand, HelpGroup

COMMANDS: Final = {
    "chat": "Chat in the terminal (also the default without a command).",
    "ask": "Answer one question and exit.",
    "serve": "Serve the routed model to other programs, as an OpenAI-compatible endpoint.",
    "show": "Print a saved answer, with both models' choices where the large one was asked.",
    "replay": "Repeat a saved answer with the recorded replies of the large model, without calls.",
    "demo": "Fetch two models; answer a question with the small one, with both and with the large"
    " one.",
    "models": "List the models and pairs of the catalogue.",
    "pull": "Fetch a model into the cache and verify it.",
    "host": "Serve a model on this machine, with mlx_lm.server or llama.cpp.",
    "calibrate": "Measure router scores on your own questions, for budgets.",
    "train": "Fit a learned head, a router, to your two models.",
    "adapt": "Tune the small model (LoRA) to the large model's answers.",
    "probe": "Find out what a server can do, and in which dialect it is called.",
    "doctor": "Check device, memory, cache, settings, network and server.",
}
"""The summary of each command, the first line of its help; see also `BENCHMARKS`."""

BENCHMARKS: Final = {
    "speed": "Compare local decoding with mlx_lm.",
    "latency": "Compare the speed of all modes at set call times.",
    "quality": "Measure the accuracy of both models and of routed answers.",
    "kernels": "Time the logit kernel against plain MLX operations.",
}
"""The summary of each command of the group `bench`."""


class ListedCommand(HelpCommand):
    """A command that shows its summary in lists, and is made when it is called.

    Args:
        name: Its name, in the group `bench` too.
        summary: First line of its help, shown in full.
        path: Its name with that of its group, such as `bench speed`.
    """

    def __init__(self, name: str, summary: str, path: str) -> None:
        super().__init__(name, short_help=summary)
        self._path = path

    def load(self) -> Any:
        """Return the command itself, with its options."""
        from mlxroute.cli.setting_options import load_all_settings, with_setting_options

        module = importlib.import_module(f"mlxroute.cli.commands.{self._path.replace(' ', '_')}")
        load = module.load_despite_bad_config if self._path == "doctor" else load_all_settings
        maker = typer.Typer(add_completion=False, rich_markup_mode=None)
        run = with_setting_options(getattr(module, str(self.name)), self._path, load=load)
        maker.command(self.name, cls=HelpCommand, short_help=self.short_help)(run)
        return typer.main.get_command(maker)

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Return a context of the command itself, by which it is then run or completed."""
        return self.load().make_context(*args, **options)


def add_commands(root: HelpGroup) -> None:
    """Add all commands to the program's group, and to it the group `bench`."""
    for name, summary in COMMANDS.items():
        root.add_command(ListedCommand(name, summary, name))
    text = "Run a benchmark together with its baselines."
    bench = HelpGroup(name="bench", help=text, short_help=text, rich_markup_mode=None)
    for name, summary in BENCHMARKS.items():
        bench.add_command(ListedCommand(name, summary, f"bench {name}"))
    root.add_command(bench)
