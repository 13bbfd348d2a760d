import json
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import preference_rows
from datasets import Dataset

from trl_ssrm import SSRMConfig, SSRMTrainer
from trl_ssrm.reporting.plots import TITLES, plot_rounds
from trl_ssrm.reporting.report import round_table, write_report
from trl_ssrm.reporting.trackers import report_run
from trl_ssrm.reporting.verdict import verdict
from trl_ssrm.rounds.labeling_summary import as_text, shorten


HISTORY = [
    {"round": 0, "temperature": 1.0, "eval_accuracy": 0.7, "eval_log_loss": 0.6},
    {
        "round": 1,
        "temperature": 1.0,
        "eval_accuracy": 0.75,
        "eval_log_loss": 0.5,
        "pool_size": 40,
        "kept": 30,
        "coverage": 0.75,
        "pseudo_label_accuracy": 0.9,
    },
]


def test_table_has_a_line_a_round_and_a_dash_for_what_a_round_lacks():
    lines = round_table(HISTORY).splitlines()
    assert lines[0] == (
        "| Round | Pool | Kept | Coverage | Pseudo-label accuracy | Temperature | Eval accuracy | Eval log-loss |"
    )
    assert lines[2] == "| 0 | – | – | – | – | 1.000 | 0.700 | 0.600 |"
    assert lines[3] == "| 1 | 40 | 30 | 0.750 | 0.900 | 1.000 | 0.750 | 0.500 |"


def test_plot_is_a_picture(tmp_path):
    plot_rounds(HISTORY, str(tmp_path / "plot.png"), references={"all labels": {"accuracy": 0.8, "log_loss": 0.4}})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- The report of a run ----

PAYLOAD = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"></dd></div>"


def rows_with_payload(num_rows: int) -> Dataset:
    return Dataset.from_list(
        [{**row, "prompt": f"{PAYLOAD} {row['prompt']}"} for row in preference_rows(num_rows, seed=2)]
    )


@pytest.fixture(scope="module")
def trainer(llama, tmp_path_factory) -> SSRMTrainer:
    """A run that is over, with everything that a report shows."""
    args = SSRMConfig(
        output_dir=str(tmp_path_factory.mktemp("reports") / "a <b>run"),
        report_to="tensorboard",
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        num_train_epochs=4,
        num_rounds=2,
        confidence_threshold=0.6,
        track_pseudo_label_accuracy=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    labeled, held_out, calibration = (
        Dataset.from_list(preference_rows(num_rows, seed)) for num_rows, seed in ((16, 1), (20, 3), (12, 4))
    )
    trainer = SSRMTrainer(
        llama,
        args,
        train_dataset=labeled,
        eval_dataset={"$easy_1$": held_out},
        unlabeled_dataset=rows_with_payload(40),
        calibration_dataset=calibration,
    )
    trainer.train()
    return trainer


@pytest.fixture
def copy(trainer, tmp_path) -> Path:
    """The same run in a place where a test may damage it."""
    return Path(shutil.copytree(trainer.args.output_dir, tmp_path / "run"))


def labeling_of(trainer: SSRMTrainer, round: int) -> dict:
    return json.loads((trainer.run.round_dir(round) / "labeling.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, path: str | Path):
        super().__init__()
        self.tags: Counter = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, own, value in self.attributes if own == name]


@pytest.fixture
def page(trainer) -> Page:
    return Page(Path(trainer.args.output_dir) / "report.html")


def test_report_fetches_nothing_and_runs_nothing(page):
    assert not {"script", "link", "iframe", "object", "embed", "img", "form", "base"} & page.tags.keys()
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset", "data")]
    assert all(value.startswith("#") for name in ("href", "xlink:href") for value in page.values(name))
    assert page.source.count("url(") == page.source.count("url(#") and "@import" not in page.source
    assert any(value.startswith("default-src 'none'; style-src 'unsafe-inline';") for value in page.values("content"))


def test_text_of_a_user_is_shown_as_it_is(page, trainer):
    pairs = labeling_of(trainer, 2)["examples"]["most_confident"]
    assert all(PAYLOAD in pair["prompt"] and pair["prompt"] in page.text for pair in pairs)
    assert "a <b>run" in page.text and "b" not in page.tags


def test_plots_are_in_the_report_with_words_and_beside_it(page, trainer):
    assert page.tags["svg"] == len(TITLES) == 7
    for name, title in TITLES.items():
        assert title in page.text
        assert (Path(trainer.args.output_dir) / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    accuracy = ", ".join(f"{facts['eval_$easy_1$_accuracy']:.3f}" for facts in trainer.round_history)
    assert any(f"eval $easy 1$ pairs {accuracy}" in words for words in page.values("aria-label"))
    ids = Counter(page.values("id"))
    assert max(ids.values()) == 1


def test_report_tells_the_settings_the_versions_and_the_end(page, trainer):
    import trl

    end = trainer.run.root / "end.json"
    kept = json.loads(end.read_text(encoding="utf-8"))["kept_round"]
    assert " ".join(verdict(trainer.round_history, "max_rounds", kept)) in page.text
    for text in ("confidence_threshold", "0.6", "learning_rate", "0.003", "trl_ssrm", trl.__version__):
        assert text in page.text


def test_report_of_rounds_that_a_callback_ended(copy):
    (copy / "_rounds" / "end.json").write_text(
        json.dumps({"termination_reason": "my <own>", "kept_round": 1, "trained_on": "Trained on <b>."})
    )
    text = Page(write_report(str(copy))).text
    assert (
        "The rounds ended after round 2 (my <own>); round 1 had the lowest log-loss on `calibration_dataset`" in text
    )


def test_report_needs_no_torch(copy):
    program = "import sys; from trl_ssrm.reporting.report import write_report; write_report(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(copy)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "False"


def test_report_of_an_interrupted_run_tells_the_rounds_so_far(copy):
    (copy / "_rounds" / "end.json").unlink()
    (copy / "_rounds" / "round_2" / "round.json").unlink()
    page = Page(write_report(str(copy)))
    assert "it is still training, or was interrupted. Finished rounds: 2." in page.text
    assert "Labeled for round 2" in page.text and page.tags["svg"] == 7
    for round in (0, 1, 2):
        shutil.rmtree(copy / "_rounds" / f"round_{round}")
    assert "Finished rounds: 0." in Page(write_report(str(copy), str(copy / "other.html"))).text


def test_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="There is no run in .*; pass the `output_dir` of an `SSRMTrainer`"):
        write_report(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_goes_wrong_with_the_report_does_not_end_the_run(copy, caplog):
    (copy / "_rounds" / "round_1" / "labeling.json").write_text("{")
    with pytest.raises(ValueError, match=r"labeling.json is damaged"):
        write_report(str(copy))
    report_run(str(copy), [], 10)
    assert f"writing its report failed. Try `trl-ssrm report {copy}`" in caplog.text


def test_without_matplotlib_the_log_says_how_to_get_a_report(copy, caplog, monkeypatch):
    (copy / "report.html").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report_run(str(copy), [], 10)
    (line,) = caplog.messages
    assert "pip install matplotlib" in line and f"trl-ssrm report {copy}" in line
    assert not (copy / "report.html").exists()
    with pytest.raises(ImportError, match="pip install"):
        write_report(str(copy))


def test_texts_of_the_pool_stay_out_of_what_is_pushed(trainer, tmp_path):
    ignored = Path(trainer.args.output_dir) / ".gitignore"
    assert ignored.read_text() == "report.html\n"
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "report.html").exists()


def test_model_card_shows_the_plots_wherever_it_is_saved(trainer, tmp_path):
    trainer.save_model(str(tmp_path / "saved"))
    for directory in (Path(trainer.args.output_dir), tmp_path / "saved"):
        card = (directory / "README.md").read_text(encoding="utf-8")
        for name, title in TITLES.items():
            assert f"![{title}](plots/{name}.png)" in card
            assert (directory / "plots" / f"{name}.png").is_file()


def test_plots_go_to_the_tracker_at_the_last_step(trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in Path(trainer.args.output_dir).parent.rglob("events.out.tfevents*")}
    charts = EventAccumulator(str(events)).Reload()
    assert set(charts.Tags()["images"]) == {f"plots/{name}" for name in TITLES}
    (image,) = charts.Images("plots/accuracy")
    assert image.step == trainer.round_history[-1]["global_step"] and image.width > 500
    assert image.encoded_image_string.startswith(b"\x89PNG")


# ---- What a run keeps of a labeling ----


def test_histograms_count_every_pair_once(trainer):
    for facts in trainer.round_history[1:]:
        for histogram in labeling_of(trainer, facts["round"])["histograms"].values():
            assert sum(histogram["pool"]) == facts["pool_size"] and sum(histogram["kept"]) == facts["kept"]
            wrong = round((1 - facts["pseudo_label_accuracy"]) * facts["kept"])
            assert sum(histogram["wrong"]) == wrong


def test_examples_are_the_surest_pairs_and_those_at_the_threshold(trainer):
    examples = labeling_of(trainer, 1)["examples"]
    kept = sorted(trainer.run.read_pseudo_labels(1)[0]["confidence"])
    confidences = {kind: [pair["confidence"] for pair in pairs] for kind, pairs in examples.items()}
    assert confidences["most_confident"] == kept[:-6:-1] and confidences["above_threshold"] == kept[:5]
    assert all(confidence <= 0.6 for confidence in confidences["below_threshold"])
    assert confidences["below_threshold"] == sorted(confidences["below_threshold"], reverse=True)
    gold = {row["prompt"]: row["chosen"] for row in rows_with_payload(40)}
    for pair in sum(examples.values(), []):
        assert pair["is_wrong"] == (gold[pair["prompt"]] != pair["chosen"])


def test_hidden_labels_leave_no_trace_in_what_is_kept(llama, config, labeled, unlabeled):
    def kept(pool: Dataset) -> str:
        args = config(num_rounds=1, num_train_epochs=1, confidence_threshold=0.5)
        trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=pool)
        trainer.train()
        text = (trainer.run.round_dir(1) / "labeling.json").read_text(encoding="utf-8")
        shutil.rmtree(args.output_dir)
        return text

    swapped = unlabeled.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    one = kept(unlabeled)
    assert kept(swapped) == one
    assert not [key for key in ('"wrong":', '"is_wrong":', '"mistakes":') if key in one]


@pytest.mark.parametrize("kept_threshold", [None, 1.0])
def test_labeling_that_keeps_nothing_is_reported(trainer, copy, kept_threshold):
    from trl_ssrm.rounds.labeling_summary import summarize_labeling
    from trl_ssrm.scoring.pair_scores import PairScores

    pool = trainer.data.pool
    scores = PairScores(np.zeros(len(pool)))
    summary = summarize_labeling(pool, scores, np.zeros(len(pool), dtype=bool), kept_threshold)
    assert not summary["examples"]["most_confident"] and len(summary["examples"]["below_threshold"]) == 5
    (copy / "_rounds" / "round_3").mkdir()
    (copy / "_rounds" / "round_3" / "labeling.json").write_text(json.dumps(summary))
    assert "Labeled for round 3" in Page(write_report(str(copy))).text


def test_long_text_is_cut_where_a_mark_says_so():
    assert shorten("a" * 10, 10) == "a" * 10
    assert shorten("a" * 2000 + "b", 10) == "a" * 10 + " [… 1,991 characters left out …]"
    assert shorten("a" * 10 + "x" * 50 + "b" * 10, 10, 10) == f"{'a' * 10} [… 50 characters left out …] {'b' * 10}"


def test_messages_are_shown_as_a_person_reads_them():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert as_text(prompt) == "system: Be kind.\nuser: Hi"
    assert as_text([{"role": "assistant", "content": "Hello"}]) == "Hello"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert as_text([call]) == '[{"name": "add"}]'


# ---- In a browser ----


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


def opened(browser, path: Path, width: int = 1280, scheme: str = "light") -> dict[str, str | None]:
    """Opens a page, all of it unfolded, and gives the addresses that it asks for, and why one was refused."""
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get_log("performance")
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    of = {
        name: [event["params"] for event in events if event["method"] == f"Network.{name}"]
        for name in ("requestWillBeSent", "loadingFailed")
    }
    refused = {event["requestId"]: event.get("blockedReason") for event in of["loadingFailed"]}
    # The browser's own start page may still be loading.
    sent = [event for event in of["requestWillBeSent"] if event["documentURL"] == path.as_uri()]
    return {event["request"]["url"]: refused.get(event["requestId"]) for event in sent}


@pytest.mark.parametrize("width", [390, 1280])
def test_browser_shows_all_of_it_and_asks_for_nothing_else(browser, trainer, width):
    path = Path(trainer.args.output_dir) / "report.html"
    assert opened(browser, path, width) == {path.as_uri(): None}
    assert browser.title == "Report: a <b>run"
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, h4, svg, table, .pair')].map(each => {"
        "const box = each.getBoundingClientRect(); return [each.tagName, box.width, box.height, box.right]})"
    )
    assert Counter(tag for tag, *_ in sizes)["svg"] == 7
    for tag, box_width, height, right in sizes:
        assert box_width > (250 if tag == "svg" else 20) and height > (150 if tag == "svg" else 10)
        assert right <= width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(browser, trainer, scheme):
    opened(browser, Path(trainer.args.output_dir) / "report.html", scheme=scheme)
    colors = browser.execute_script(
        "const style = each => getComputedStyle(document.querySelector(each));"
        "return [style('body').backgroundColor, style('figure').backgroundColor, style('body').color,"
        " style('figcaption p').color, style('dt').color, style('figure svg text').fill,"
        " style('.right, .wrong').color]"
    )
    light = [luminance(color) for color in colors]
    for ground in light[:2]:
        assert (ground > 0.5) == (scheme == "light")
        for ink in light[2:]:
            assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.5


def luminance(color: str) -> float:
    """Relative luminance, as the Web Content Accessibility Guidelines define it, of `rgb(r, g, b)`."""
    shares = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_script_in_a_prompt_does_not_run_even_were_it_not_escaped(browser, copy):
    path = Path(write_report(str(copy)))
    opened(browser, path)
    assert browser.title == "Report: run"
    source = path.read_text(encoding="utf-8")
    escaped = PAYLOAD.translate({ord("<"): "&lt;", ord(">"): "&gt;", ord("'"): "&#39;", ord('"'): "&#34;"})
    assert escaped in source
    raw = source.replace(escaped, PAYLOAD)
    path.write_text(raw, encoding="utf-8")
    assert opened(browser, path) == {path.as_uri(): None, (path.parent / "x").as_uri(): "csp"}
    assert browser.title == "Report: run"
    path.write_text(raw.replace("Content-Security-Policy", "nothing"), encoding="utf-8")
    opened(browser, path)
    assert browser.title == "run"


def test_run_with_the_default_settings_has_a_report(llama, held_out, tmp_path):
    args = SSRMConfig(
        output_dir=str(tmp_path / "run"),
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = {
        name: Dataset.from_list(preference_rows(size, seed))
        for name, size, seed in (("train", 16, 1), ("unlabeled", 30, 2))
    }
    trainer = SSRMTrainer(
        llama, args, train_dataset=data["train"], unlabeled_dataset=data["unlabeled"], eval_dataset=held_out
    )
    trainer.train()
    page = Page(tmp_path / "run" / "report.html")
    assert "held-out pairs (`eval_dataset`)" in page.text and "Trained from " in page.text
    assert page.tags["svg"] >= 5
