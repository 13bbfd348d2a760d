"""Names, settings, flags, files and links of the documentation exist, and its pages are short."""

import argparse
import ast
import functools
import inspect
import keyword
import re
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import transformers
import trl
import yaml
from accelerate.commands.launch import launch_command_parser
from pages import GUIDES, PAGES, README, ROOT, blocks, prose, quoted
from trl import ModelConfig

import trl_ssrm
from trl_ssrm import SSRMConfig, SSRMRewardFunction, SSRMTrainer
from trl_ssrm.cli.main import make_parser
from trl_ssrm.cli.quickstart import make_parser as make_quickstart_parser
from trl_ssrm.cli.train import make_parser as make_train_parser


def table(page: Path, heading: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^\|.*\|$", text[text.index(heading) :].partition("\n\n")[0], re.MULTILINE)[2:]


OWN_SETTINGS = {field.name for field in fields(SSRMConfig)} - {field.name for field in fields(trl.RewardConfig)}


def test_settings_of_the_table_are_accepted():
    told = set()
    for row in table(GUIDES / "settings.md", "| Situation | Set |"):
        for name, value in re.findall(r"`(\w+)=([^`]+)`", row):
            # It means nothing to a scalar model.
            beside = {"preference_model": "pairwise"} if name == "comparison_orders" else {}
            assert name in OWN_SETTINGS, name
            SSRMConfig(output_dir="unused", bf16=False, **{**beside, name: ast.literal_eval(value)})
            told.add(name)
    # `comparison` is a path, and shown on the page of the pairwise model.
    assert told == OWN_SETTINGS - {"comparison"}


def test_settings_that_matter_are_settings_with_these_defaults():
    rows = table(README, "| Setting | Default | Change it |")
    assert len(rows) == 5
    for row in rows:
        name, default = re.findall(r"^\| `(\w+)` \| (.*?) \|", row)[0]
        assert name in OWN_SETTINGS
        value = getattr(SSRMConfig(output_dir="unused", bf16=False), name)
        # A default of `None` is told in words.
        assert value is None or ast.literal_eval(default.strip("`")) == value
    text = README.read_text(encoding="utf-8")
    assert f"has the other {len(OWN_SETTINGS) - len(rows)}." in text
    assert f"with {len(OWN_SETTINGS)} more settings" in (GUIDES / "settings.md").read_text(encoding="utf-8")


# Names of other projects that the text uses.
OF_OTHERS = {
    "fsdp_version",  # accelerate's configuration
    "base_model_name_or_path",  # PEFT
    "modules_to_save",
    "weights_only",  # torch.load
    "lscpu",
    "avx512_bf16",
    "amx_bf16",
    "round_N",  # the number of a round in a path
}
EXTENSIONS = "cff|csv|gitignore|html|ipynb|json|jsonl|md|parquet|pt|pth|py|sh|yaml"


@functools.cache
def code_names() -> tuple[set[str], set[str]]:
    """Names that the code defines, and texts in it: words in comments, docstrings and messages are neither."""
    names, texts = set(), set()
    for path in (*ROOT.glob("trl_ssrm/**/*.py"), *ROOT.glob("recipes/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                    names.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Constant(value=str(text)):
                    texts.add(text)
    return names | {text for text in texts if text.isidentifier()}, texts


def unknown_names(quotes: list[str], words: set[str]) -> set[str]:
    # Strings are values, files have a test of their own, and flags too.
    pattern = rf"\"[^\"]*\"|[\w./-]*\.({EXTENSIONS})\b|--\w+"
    found = {name for each in quotes for name in re.findall(r"(?<!\w)[A-Za-z_]\w*", re.sub(pattern, " ", each))}
    return {name for name in found if name not in words and not keyword.iskeyword(name) and len(name) > 3}


@pytest.fixture(scope="module")
def words() -> set[str]:
    """Names that can stand in a text: ours, those of the libraries under us, and the programs of the blocks."""
    of_libraries = {name for module in (trl, transformers, datasets) for name in dir(module)}
    of_types = {name for kind in (SSRMTrainer, SSRMConfig, SSRMRewardFunction) for name in dir(kind)}
    arguments = {name for kind in (SSRMConfig, ModelConfig) for name in kind.__dataclass_fields__}
    arguments |= set(inspect.signature(trl.RewardTrainer.__init__).parameters)
    arguments |= set(inspect.signature(SSRMTrainer.train).parameters)
    arguments |= {action.dest for action in launch_command_parser()._actions}
    blocks_of_pages = "\n".join(line for page in PAGES for name in ("bash", "python") for line in blocks(page, name))
    of_blocks = {"make", *re.findall(r"[A-Za-z_]\w*", blocks_of_pages)}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    folders = {
        path.name for path in (*ROOT.glob("*"), *ROOT.glob("recipes/*"), *ROOT.glob("tests/*")) if path.is_dir()
    }
    return code_names()[0] | of_libraries | of_types | arguments | of_blocks | targets | folders | OF_OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_exist(page, words):
    assert not unknown_names(quoted(page), words)


@pytest.mark.parametrize(
    "name",
    # Names that were settings once, and slips in names that are.
    [
        "adaptive_threshold=True",
        "balance_by",
        "round_patience",
        "num_fold",
        "SSRMConfig(no_such=1)",
        "calibration_data",
    ],
)
def test_names_that_do_not_exist_are_noticed(name, words):
    assert unknown_names([name], words)


@functools.cache
def our_commands() -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in make_parser()._actions if action.dest == "command")


@functools.cache
def flags_of_ours() -> set[str]:
    """Flags of the command, of accelerate's launcher behind it, and of the recipes."""
    parsers = [make_train_parser(), make_quickstart_parser(), launch_command_parser(), *our_commands().values()]
    found = {flag for parser in parsers for flag in parser._option_string_actions}
    for path in ROOT.glob("recipes/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(f"--{node.target.id}")
    return found


# Files that transformers writes or the reader has.
FILES_OF_READERS = {
    "train.parquet",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "labels.csv",
    "pool.csv",
    "test.csv",
}


def wrong_parts(quote: str, readers: str = "") -> list[str]:
    """Flags, files and commands in a piece of code within a sentence that do not exist."""
    found = [flag for flag in re.findall(r"(?<![\w-])--\w+", quote) if flag not in flags_of_ours()]
    ours = {path.name for path in (*ROOT.glob("*.*"), *ROOT.glob("recipes/**/*.*"), *ROOT.glob("tests/**/*.*"))}
    for file in re.findall(rf"[\w./-]*\.(?:{EXTENSIONS})\b", quote):
        name = file.rpartition("/")[2]
        is_written = any(text.endswith(name) for text in code_names()[1])
        if not is_written and name not in ours | FILES_OF_READERS and name not in readers:
            found.append(file)
    program, *words = quote.split()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    if program == "make" and not re.search(rf"^{words[0]}:", makefile, re.MULTILINE):
        found.append(quote)
    if program == "trl-ssrm" and words and words[0] not in our_commands():
        found.append(quote)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_flags_files_and_commands_in_sentences_exist(page):
    readers = " ".join(blocks(page, "bash") + blocks(page, "python"))
    assert not [wrong for quote in quoted(page) for wrong in wrong_parts(quote, readers)]


@pytest.mark.parametrize(
    "quote",
    ["--no_such_flag 3", "trl-ssrm train --second_opinion", "no_such.py", "make nothing", "trl-ssrm nothing"],
)
def test_parts_of_sentences_that_do_not_exist_are_noticed(quote):
    assert wrong_parts(quote)


def test_messages_of_the_guide_are_raised():
    messages = [re.findall(r'^\| "(.+?)" \|', row)[0] for row in table(GUIDES / "troubleshooting.md", "| Message |")]
    of_others = {"Your setup doesn't support bf16/gpu", "No module named 'requests'"}
    texts = code_names()[1]
    ours = [message.removesuffix(" score.weight") for message in messages if message not in of_others]
    assert len(ours) == 4 and of_others < set(messages)
    assert not [message for message in ours if not any(message in text for text in texts)]


def test_pages_are_short():
    lengths = {page: len(page.read_text(encoding="utf-8").splitlines()) for page in PAGES}
    assert lengths[README] <= 200
    assert not [page.name for page, length in lengths.items() if page != README and length > 150]


def test_guides_are_linked_from_the_readme():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text(encoding="utf-8"))
    assert not [page.name for page in PAGES[1:] if page.relative_to(ROOT).as_posix() not in links]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = prose(page)

    def anchors(path: Path) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == trl_ssrm.__version__
    paper = citation["preferred-citation"]
    assert paper["title"] == SSRMTrainer._paper["title"] and SSRMTrainer._paper["id"] in paper["url"]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) in SSRMTrainer._paper["citation"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, *releases = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    assert unreleased.startswith("[Unreleased]\n")
    assert all(re.match(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d\n", release) for release in releases)
    for release in (unreleased, *releases):
        groups = re.findall(r"^### (.+)$", release, re.MULTILINE)
        assert groups and len(groups) == len(set(groups))
    # Before there is a release, nothing of one can be repaired.
    assert releases or "### Fixed" not in unreleased
