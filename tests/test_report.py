from trl_ssrm.report import plot_rounds, round_line, round_table


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


def test_line_of_a_round():
    assert round_line(HISTORY[1]) == (
        "Round 1, kept 30 of 40 pairs, eval_accuracy 0.750, eval_log_loss 0.500, pseudo_label_accuracy 0.900"
    )


def test_plot_is_a_picture(tmp_path):
    plot_rounds(HISTORY, str(tmp_path / "plot.png"), references={"all labels": {"accuracy": 0.8, "log_loss": 0.4}})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
