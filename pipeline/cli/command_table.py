"""The table of commands: what each is for, its settings, its function, and examples for its help.

Settings and functions are named, and imported when they are used, so that help is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings, and the function that takes them and returns the exit status."""

    summary: str
    """One line for the list of commands; the docstring of the settings says more."""
    settings_name: str
    """module:class, imported when the command is parsed."""
    function: str
    """module:function, imported when the command runs."""
    examples: tuple[tuple[str, str], ...] = ()
    """Command lines for help, each with what it does."""
    without: frozenset[str] = frozenset()
    """Settings that have no effect in this command and get no flags."""
    needs: tuple[str, ...] = ("ray", "pyarrow")
    """Packages of the extra `batch` without which the command cannot run."""
    starts_ray: bool = True
    """False if it only asks a cluster that exists, with the token that its user has."""
    is_job: bool = False
    """What it makes is in its output, so that it has not failed when nothing can be printed. Of
    `blip2 submit`, that of the job counts."""

    def parts(self, name: str) -> list[str]:
        """Return the parts of a configuration file that apply; a plan also has that of its command."""
        return [*(["caption"] if name == "plan" else name.split()[1:]), name]

    @property
    def settings(self) -> type:
        return _imported(self.settings_name)

    def load(self) -> Callable[[Any], int]:
        return _imported(self.function)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


SUBMIT = "submit"
SERVE = "serve"
CONFIG = "config"
COMPLETION = "completion"
JOB = frozenset({"job", "job_flags", "job_settings"})
"""What `blip2 submit` takes from the rest of its command line."""
ONLY_FOR_RUNS = frozenset({"fork", "add_new", "redo_changed", "slice", "serving"})
NO_RAY = ("pyarrow",)
FREQUENT = (
    *("input", "output", "model", "device", "dtype", "prompt", "ask", "max_new_tokens", "num_beams"),
    *("limit", "keep", "max_failed_fraction", "add_new", "embed", "text_column", "score_model", "sample"),
)
"""Fields whose flags short help shows."""

_JOB = "pipeline.settings.job_settings:"
_PLAN = "pipeline.settings.plan_settings:"
_READ = "pipeline.settings.report_settings:"
COMMANDS = {
    "demo": Command(
        "Render drawn scenes, caption them and grade the captions.",
        "pipeline.settings.demo_settings:DemoSettings",
        "pipeline.demo.demo:demo",
        (("blip2 demo --num-images 300", "a short demonstration, in the folder demo_output"),),
    ),
    "caption": Command(
        "Caption every image of an input; run again to resume.",
        _JOB + "CaptionSettings",
        "pipeline.cli.commands:caption",
        (
            ("blip2 caption photos -o captions", "caption a folder of images"),
            (
                "blip2 caption 's3://bucket/{000..099}.tar' -o s3://bucket/captions --keep txt",
                "tars in a bucket; their texts are kept next to the captions",
            ),
            (
                "blip2 caption photos -o answers --prompt 'Question: how many people? Answer:'",
                "ask a question of every image",
            ),
        ),
        is_job=True,
    ),
    "embed": Command(
        "Embed every image of an input; run again to resume.",
        _JOB + "EmbedSettings",
        "pipeline.cli.commands:caption",
        (
            ("blip2 embed photos -o vectors", "one vector per image, of the Q-Former"),
            ("blip2 embed photos -o vectors --embed v=vision q=queries", "two columns of vectors"),
            ("blip2 embed table.parquet -o vectors --keep url", "images of a table; its url is kept"),
        ),
        is_job=True,
    ),
    "score": Command(
        "Score how well a text fits its image, for every row of an input; run again to resume.",
        _JOB + "ScoreSettings",
        "pipeline.cli.commands:caption",
        (
            ("blip2 score table.parquet -o scores --text-column alt", "log-probabilities of texts"),
            (
                "blip2 score pairs.parquet -o fit --text-column alt --score-model Salesforce/blip2-itm-vit-g",
                "probabilities that image and text match",
            ),
            ("blip2 score 'tars/*.tar' -o scores --text-column txt", "texts that are members of tars"),
        ),
        is_job=True,
    ),
    "plan": Command(
        "Predict time, workers, bottleneck and bytes of a caption command from a sample.",
        _PLAN + "PlanSettings",
        "pipeline.plan.plan:plan",
        (
            ("blip2 plan photos", "how long it takes to caption a folder"),
            ("blip2 plan photos --sample 8 --num-beams 5", "fewer rows, with the flags of the run"),
            ("blip2 plan embed photos", "the same for blip2 embed; blip2 plan score for blip2 score"),
        ),
        ONLY_FOR_RUNS,
    ),
    "plan embed": Command(
        "Predict an embed command from a sample.",
        _PLAN + "PlanEmbedSettings",
        "pipeline.plan.plan:plan",
        (("blip2 plan embed photos", "how long it takes to embed a folder"),),
        ONLY_FOR_RUNS,
    ),
    "plan score": Command(
        "Predict a score command from a sample.",
        _PLAN + "PlanScoreSettings",
        "pipeline.plan.plan:plan",
        (("blip2 plan score table.parquet --text-column alt", "how long it takes to score a table"),),
        ONLY_FOR_RUNS,
    ),
    "report": Command(
        "Report on the rows of a run: failures, lengths, repeated captions.",
        _READ + "ReportSettings",
        "pipeline.report.report:report",
        (
            ("blip2 report captions", "the figures, in the terminal"),
            ("blip2 report captions --html report.html", "a page with sample rows and their pictures"),
            ("blip2 report captions --card README.md", "a dataset card for the Hugging Face hub"),
        ),
        needs=NO_RAY,
    ),
    "compare": Command(
        "Compare two runs over the same images, and captions with references.",
        _READ + "CompareSettings",
        "pipeline.compare.command:command",
        (
            ("blip2 compare captions captions_coco", "what has changed from one run to the other"),
            ("blip2 compare before after --html changes.html", "the largest changes on a page"),
            ("blip2 compare before after --reference txt", "which one is nearer to a kept column"),
        ),
        needs=NO_RAY,
    ),
    "calibrate": Command(
        "Fit the probability that a caption is right, on captions whose truth is known.",
        _READ + "CalibrateSettings",
        "pipeline.compare.calibrate:command",
        (
            ("blip2 calibrate captions --reference truth", "by a column that was kept with --keep truth"),
            ("blip2 calibrate captions --judged judged.csv", "by what a person says of some captions"),
        ),
        needs=NO_RAY,
    ),
    "doctor": Command(
        "Check this machine, and a model, an input and an output.",
        "pipeline.settings.doctor_settings:DoctorSettings",
        "pipeline.doctor.doctor:doctor",
        (
            ("blip2 doctor", "check this machine"),
            ("blip2 doctor -m Salesforce/blip2-opt-2.7b", "whether the model can be read, and fits"),
            ("blip2 doctor -m demo --input photos -o captions", "everything that a run needs"),
        ),
        needs=NO_RAY,
    ),
    "export": Command(
        "Write the rows of a run in another format.",
        _READ + "ExportSettings",
        "pipeline.export.export:export",
        (
            ("blip2 export captions --to csv --into tables", "every row with every column"),
            ("blip2 export captions --to webdataset --into tars", "new tars of images and captions"),
            ("blip2 export captions --to imagefolder --into images", "images with metadata.jsonl"),
        ),
        needs=NO_RAY,
    ),
    "show": Command(
        "Show rows of a run in the terminal.",
        _READ + "ShowSettings",
        "pipeline.show.show:show",
        (
            ("blip2 show captions", "the first rows"),
            ("blip2 show captions --status not_ok --limit 0", "every failed row, and why"),
            ("blip2 show captions --sort logprob", "the least certain captions"),
        ),
        needs=("pyarrow", "rich"),
    ),
    "status": Command(
        "Show how far a run is.",
        _READ + "StatusSettings",
        "pipeline.cli.status:status",
        (
            ("blip2 status captions", "finished rows, failures by status, and the ETA"),
            ("blip2 status captions --watch", "the same again every 5 s"),
        ),
        needs=NO_RAY,
    ),
    "verify": Command(
        "Read every file of an output back and check it.",
        "pipeline.maintenance.settings:VerifySettings",
        "pipeline.maintenance.verify:verify",
        (("blip2 verify captions", "rows, order, settings and input"),),
        needs=NO_RAY,
    ),
    "clean": Command(
        "List files of an output that are no longer needed, and delete them with --yes.",
        "pipeline.maintenance.settings:CleanSettings",
        "pipeline.maintenance.clean:clean",
        (("blip2 clean captions", "list them"), ("blip2 clean captions --yes", "delete them")),
        needs=NO_RAY,
    ),
    "retry": Command(
        "Run the failed rows of an output again.",
        "pipeline.settings.retry_settings:RetrySettings",
        "pipeline.cli.commands:retry",
        (
            ("blip2 retry captions", "every row that is not ok"),
            ("blip2 retry captions --status decoder_timed_out --image-wall-s 600", "with more time"),
            ("blip2 retry captions --keys keys.txt", "the rows with these keys"),
        ),
        is_job=True,
    ),
    SUBMIT: Command(
        "Run caption, embed, score, retry or plan on a cluster.",
        "pipeline.submit.settings:SubmitSettings",
        "pipeline.submit.submit:submit",
        (
            (
                "blip2 submit caption s3://bucket/images -o s3://bucket/captions",
                "on the cluster that RAY_API_SERVER_ADDRESS names",
            ),
        ),
        JOB,
        starts_ray=False,
    ),
}
OTHERS = {
    SERVE: "Serve captions over HTTP from this machine.",
    CONFIG: "Print the settings of a command line, and where each comes from: blip2 config caption ...",
    COMPLETION: "Print the completion script of a shell: blip2 completion bash, zsh or fish.",
}
"""Commands whose flags are not their own."""
HABITS = {
    "api": SERVE,
    "ask": "caption",
    "bench": "plan",
    "benchmark": "plan",
    "check": "doctor",
    "convert": "export",
    "delete": "clean",
    "describe": "caption",
    "diagnose": "doctor",
    "encode": "embed",
    "estimate": "plan",
    "features": "embed",
    "generate": "caption",
    "head": "show",
    "infer": "caption",
    "info": "status",
    "inference": "caption",
    "list": "show",
    "ls": "show",
    "predict": "caption",
    "progress": "status",
    "resume": "caption",
    "rm": "clean",
    "run": "caption",
    "start": "caption",
    "stats": "report",
    "summary": "report",
    "validate": "verify",
    "view": "show",
    "vqa": "caption",
}
"""Commands that users of other programs type, and the command that is meant."""
