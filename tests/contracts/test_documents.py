"""Lists and messages that documents repeat are compared with the code."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

import blip2_actor
import pipeline
from blip2_actor import ImageLimits, Status
from blip2_actor.generation import quality_flags
from deploy.http.images import MAX_BODIES, MAX_IMAGES
from deploy.http.options import MAX_OPTIONS
from deploy.http.wishes import MAX_QUESTIONS, MAX_TEXT_CHARS, MAX_TEXTS
from deploy.settings import OnlineImageLimits
from pipeline.caption_counts import NO_FAULTS
from pipeline.submit.settings import split_arguments

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
NOT_DESCRIBED = {"blip2_actor.__version__", "pipeline.ROW_CONTRACT", "pipeline.SCHEMA_VERSION"}
"""Constants, which docs/python_api.md does not describe."""
MAX_LINE_CHARS = 125
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def _first_cells(page: str, heading: str) -> list[str]:
    """Return the first column of the first table below a heading, without the header."""
    text = (DOCS / page).read_text().split(heading, 1)[1]
    rows = [line for line in text.split("\n\n|", 1)[1].split("\n\n", 1)[0].splitlines() if "`" in line]
    return [row.lstrip("|").split("|")[0].strip(" `") for row in rows]


def test_statuses_lists_every_status() -> None:
    assert _first_cells("statuses.md", "# Statuses") == [status.value for status in Status]


def test_statuses_lists_every_flag() -> None:
    found = {quality_flags.EMPTY, quality_flags.LOOPING, quality_flags.ECHOES_PROMPT}
    assert set(_first_cells("statuses.md", "## Flags")) == found | NO_FAULTS


def test_preprocessing_lists_the_limits_of_an_image() -> None:
    """The page used to give the endpoint the limits of a job."""

    def shown(limits: ImageLimits) -> list[str]:
        mebibytes, gibibytes = limits.max_file_bytes >> 20, limits.memory_bytes >> 30
        seconds = [f"{limits.cpu_s:g} s", f"{limits.wall_s:g} s"]
        return [f"{limits.max_pixels:,}", f"{mebibytes} MiB", f"{gibibytes} GiB", *seconds]

    text = (DOCS / "preprocessing.md").read_text().split("| limit |", 1)[1].split("\n\n", 1)[0]
    table = [[cell.strip() for cell in row.split("|")[1:4]] for row in text.splitlines()[2:]]
    names, job, endpoint = zip(*table, strict=True)
    assert names == ("`max_pixels`", "`max_file_bytes`", "`memory_bytes`", "`cpu_s`", "`wall_s`")
    online = [job[i] if cell == "the same" else cell for i, cell in enumerate(endpoint)]
    assert (list(job), online) == (shown(ImageLimits()), shown(OnlineImageLimits()))


def test_api_lists_the_limits_of_a_request() -> None:
    text = (DOCS / "api.md").read_text().split("## Limits", 1)[1].split("## Errors", 1)[0]
    listed = [row.split("|")[2].strip() for row in text.splitlines() if row.startswith("|")][2:]
    beams = MAX_OPTIONS["num_beams"]
    limits = [MAX_OPTIONS["max_new_tokens"], beams, MAX_TEXT_CHARS, MAX_QUESTIONS, MAX_TEXTS, MAX_IMAGES]
    assert listed == [f"{limit:,}" for limit in limits]
    assert MAX_OPTIONS["num_return_sequences"] == beams
    assert MAX_BODIES == 4 and "four times the bytes" in text


@pytest.mark.parametrize("page", ["README.md", "docs/questions.md", "docs/speed.md"])
def test_pages_give_the_range_that_was_measured_on_a_gpu(page: str) -> None:
    """The range used to include a run with more slots than the page says."""
    file = ROOT / "benchmarks" / "results" / "engine_h100.json"
    cards = [
        card for card in json.loads(file.read_text())["final kernels"].values() if isinstance(card, dict)
    ]
    rates = [
        rate
        for card in cards
        for what, runs in card.items()
        if what in ("bfloat16, 64 images a pass", "bfloat16, 128 images a pass")
        for rate in runs
    ]
    assert f" {min(rates):.0f} to {max(rates):.0f} " in " ".join((ROOT / page).read_text().split())


def _messages() -> list[str]:
    return _first_cells("troubleshooting.md", "# Troubleshooting")


@pytest.mark.parametrize("message", _messages())
def test_the_code_says_each_message_of_troubleshooting(message: str) -> None:
    assert message in _strings_of_the_code(), "the message has changed; correct docs/troubleshooting.md"


@cache
def _strings_of_the_code() -> str:
    packages = ("blip2_actor", "pipeline", "deploy")
    text = "\n".join(path.read_text() for package in packages for path in (ROOT / package).rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", text)  # join literals that span lines


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "LOG.md"], ids=lambda page: page.name
)
def test_no_merge_left_its_markers(page: Path) -> None:
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_lines_of_prose_fit_an_editor(page: Path) -> None:
    """Tables, pictures and code may be wider."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "<", "![", "    "))]
    assert [line for line in lines if len(line) > MAX_LINE_CHARS] == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links to #{anchor}, which {file.name} lacks"


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:", 1)[1]
    assert sorted(re.findall(r"[\w/]+\.md", navigation)) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_reference_describes_every_public_name() -> None:
    described = re.findall(r"^::: (\S+)$", (DOCS / "python_api.md").read_text(), re.MULTILINE)
    public = [f"{module.__name__}.{name}" for module in (blip2_actor, pipeline) for name in module.__all__]
    assert sorted(described) == sorted(set(public) - NOT_DESCRIBED)


def _flags() -> dict[str, set[str]]:
    """Return the flags of each command, from the frozen command line."""
    flags: dict[str, set[str]] = {}
    command = ""
    for line in (ROOT / "tests" / "contracts" / "cli.txt").read_text().splitlines():
        if line.startswith(" "):
            flags[command].add(line.split()[0])
        else:
            command = line.strip()
            flags[command] = set()
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_flags_that_pages_give_them(page: Path) -> None:
    known = _flags()
    for line in re.findall(r"^(?:\.venv/bin/)?blip2 (.+)$", page.read_text(), re.MULTILINE):
        given = line.split("#")[0].split()
        given = given[1:] if given[0] == "config" else given
        # The flags of a submitted command follow it.
        for words in filter(None, split_arguments(given) if given[0] == "submit" else [given]):
            command = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
            flags = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
            flags -= {"--help", "--version"}
            if command.startswith("-"):
                continue
            assert command in known, f"{page.name} names the command {command}"
            assert flags <= known[command], f"{page.name}: {command} has no {flags - known[command]}"
