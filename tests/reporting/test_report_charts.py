from __future__ import annotations

from rlhf_ray.reporting.metrics import METRICS
from rlhf_ray.reporting.report.charts import CHARTS, chart_contents, curve_keys

DECLARED = {metric.key: metric for metric in METRICS}


def test_every_curve_is_a_declared_metric_and_those_of_a_chart_have_one_unit() -> None:
    for chart in CHARTS:
        assert len({DECLARED[key].unit for key in chart.curves}) == 1, chart.title


def test_titles_are_distinct() -> None:
    assert len({chart.title for chart in CHARTS}) == len(CHARTS)


def test_keys_that_some_chart_draws() -> None:
    drawn = ["learner/entropy", "evaluation/openai/gsm8k/reward_mean", "timers/update_s", "rewards/style/mean"]
    others = ["pid", "timers/iteration_s", "evaluation//reward_mean", "rewards/style/std", "learner/entropy/x"]
    assert curve_keys([*others, *drawn]) == drawn


def test_a_chart_has_the_curves_that_the_runs_have() -> None:
    drawn, _ = chart_contents(
        ["rollouts/reward_mean", "evaluation/b/reward_mean", "evaluation/a/reward_mean", "learner/grad_norm"]
    )
    reward, gradient = drawn
    assert (reward["title"], reward["unit"], reward["stacked"]) == ("Reward", "reward", False)
    assert [(curve["label"], curve["points"]) for curve in reward["curves"]] == [
        ("training", False),
        ("evaluation a", True),
        ("evaluation b", True),
    ]
    assert reward["curves"][0]["formula"] == DECLARED["rollouts/reward_mean"].formula
    assert [curve["label"] for curve in gradient["curves"]] == ["policy"]


def test_phases_are_stacked() -> None:
    ((chart,), _) = chart_contents(["timers/rollout_s", "timers/update_s"])
    assert chart["stacked"]
    assert [curve["key"] for curve in chart["curves"]] == ["timers/rollout_s", "timers/update_s"]


def test_charts_that_were_expected_but_are_empty_are_named() -> None:
    drawn, missing = chart_contents(["learner/entropy"])
    assert [chart["title"] for chart in drawn] == ["Entropy"]
    assert {"Reward", "KL to the reference", "Staleness"} <= set(missing)
    assert not {"Entropy", "Reward functions", "Engine against learner"} & set(missing)


def test_one_reward_function_is_the_reward_itself() -> None:
    assert chart_contents(["rewards/style/mean"])[0] == []
    ((chart,), _) = chart_contents(["rewards/style/mean", "rewards/correct/mean"])
    assert [curve["label"] for curve in chart["curves"]] == ["correct", "style"]


def test_environments_have_charts_of_their_own() -> None:
    drawn, missing = chart_contents(["environment/guess/reward_mean", "environment/guess/steps_mean"])
    assert [(chart["title"], chart["curves"][0]["label"]) for chart in drawn] == [
        ("Rewards of environments", "guess"),
        ("Turns", "guess"),
    ]
    assert not {"Rewards of environments", "Turns"} & set(chart_contents(["learner/entropy"])[1])
    assert "Reward" in missing
