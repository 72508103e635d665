"""The laws of compound scaling, budgets, fronts and gains, against the paper's figures and against each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_ops import scaling
from effnet_ops.models import model_spec
from effnet_ops.scaling import Axes, Budget, CompoundScaling, count, pareto_front
from effnet_ops.scaling.published import RELEASED, SCALED_B0

LAW = CompoundScaling()


def test_the_formula_and_the_real_networks_of_the_paper() -> None:
    assert LAW.growth == pytest.approx(1.2 * 1.1**2 * 1.15**2)
    one, two = LAW.network(1), LAW.network(2)
    assert (round(one.nominal_factor, 2), round(one.factor, 2), round(two.factor, 2)) == (1.92, 2.57, 4.69)
    assert LAW.coefficients(2) == pytest.approx((1.44, 1.21, 1.3225))
    assert LAW.network(0).factor == 1.0
    assert LAW.spec(1).resolution == 258


def test_released_networks_imply_different_phis() -> None:
    phis = {row.spec.name[-2:]: scaling.implied_phi(row.spec) for row in RELEASED}
    assert phis["b0"] == (0.0, 0.0, 0.0)
    assert [round(value, 2) for value in phis["b4"]] == [3.22, 3.53, 3.78]
    assert scaling.implied_phi(LAW.spec(2.0)) == pytest.approx((2, 2, 2), abs=0.01)


def test_realised_axes_are_after_rounding() -> None:
    axes = scaling.realised_axes("efficientnet_b1")
    assert axes.depth == 23 / 16
    assert axes.width == 1.0
    with pytest.raises(ValueError, match="3 stages"):
        scaling.realised_axes(scaling.digits.TINY)


@pytest.mark.parametrize("budget", ["2GMACs", "3.9GFLOPs", "20Mparams", "100MB", "100MMACs", "3MiB"])
def test_phi_for_a_budget_is_the_largest_that_fits(budget: str) -> None:
    wanted = Budget.parse(budget)
    cost = scaling.budget.spec_cost(wanted)
    phi = LAW.phi_for(budget)
    assert cost(LAW.spec(phi)) <= wanted.amount < cost(LAW.spec(phi + 2e-4))


@given(st.floats(-4, 8), st.floats(0.001, 3))
@settings(max_examples=30, deadline=None)
def test_costs_never_fall_as_phi_grows(phi: float, step: float) -> None:
    a, b = count(LAW.spec(phi)), count(LAW.spec(phi + step))
    assert a.macs <= b.macs and a.parameters <= b.parameters and a.fused_saved_bytes <= b.fused_saved_bytes


def test_nominal_phi_inverts_the_formula() -> None:
    assert LAW.nominal_factor(LAW.nominal_phi(5.0)) == pytest.approx(5.0)


@pytest.mark.parametrize("value", [0.99, -1, math.nan, math.inf, True, "1.2"])
def test_coefficients_below_one_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="beta must be a number of at least 1"):
        CompoundScaling(1.2, value, 1.15)


def test_budgets_that_nothing_meets() -> None:
    with pytest.raises(ValueError, match=r"budget 1 MMACs is infeasible: even phi = -8 takes 7\.652 MMACs"):
        LAW.phi_for("1MMACs")
    with pytest.raises(ValueError, match="beyond phi"):
        CompoundScaling(1.0, 1.0, 1.2).phi_for("20Mparams")
    with pytest.raises(ValueError, match="scales nothing"):
        CompoundScaling(1, 1, 1).phi_for("2GMACs")
    with pytest.raises(ValueError, match="needs a measured cost"):
        LAW.phi_for("15ms")
    assert LAW.phi_for("15ms", cost=lambda spec: count(spec).macs * 1e-11) == pytest.approx(LAW.phi_for("1.5GMACs"))


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("2GMACs", "macs", 2e9),
        ("2 gmacs", "macs", 2e9),
        ("4GFLOPs", "macs", 2e9),
        ("20Mparams", "parameters", 2e7),
        ("20Mparameters", "parameters", 2e7),
        ("15ms", "latency", 0.015),
        ("1.5e-2s", "latency", 0.015),
        ("100MB", "memory", 1e8),
        ("2MiB", "memory", 2**21),
    ],
)
def test_budgets_are_read(text: str, kind: str, amount: float) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, pytest.approx(amount))
    assert Budget.parse(str(budget).replace(" ", "")).amount == pytest.approx(amount, rel=1e-3)


@pytest.mark.parametrize("text", ["", "15", "ms", "-3ms", "0ms", "1.2.3ms", "nanms", None, 5])
def test_budgets_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match=r"a budget (is|must be) "):
        Budget.parse(text)


def test_unknown_units_get_the_closest() -> None:
    with pytest.raises(ValueError, match="unknown unit of a budget 'GMac'; did you mean 'GMACs'"):
        Budget.parse("2GMac")
    with pytest.raises(ValueError, match="did you mean 'memory'"):
        Budget("memry", 3.0)


def test_single_axes_leave_the_others() -> None:
    base = model_spec("efficientnet_b0")
    for axis in Axes._fields:
        spec = scaling.single_axis("efficientnet_b0", axis, "1.8GMACs")
        assert 1.6e9 < count(spec).macs <= 1.8e9
        kept = [name for name in Axes._fields if name != axis]
        assert all(getattr(spec, name) == getattr(base, name) for name in kept)
    with pytest.raises(ValueError, match="did you mean 'width'"):
        scaling.single_axis("efficientnet_b0", "widht", "2GMACs")


def test_pareto_front_against_its_definition() -> None:
    points = [{"a": i * 7 % 5, "b": i * 3 % 4, "score": i * 11 % 6} for i in range(30)]

    def better(p: dict, q: dict) -> bool:
        """p beats q."""
        at_least = p["a"] <= q["a"] and p["b"] <= q["b"] and p["score"] >= q["score"]
        return at_least and p != q

    front = pareto_front(points, ("a", "b"))
    assert all((p in front) == (not any(better(q, p) for q in points)) for p in points)
    assert [p["a"] for p in front] == sorted(p["a"] for p in front)


def test_pareto_front_takes_names_attributes_and_functions() -> None:
    specs = [model_spec(f"efficientnet_b{i}") for i in (3, 0, 1)]
    front = pareto_front(specs, (lambda s: count(s).macs,), scaling.published_accuracy)
    assert [spec.name[-2:] for spec in front] == ["b0", "b1", "b3"]
    assert pareto_front([]) == []
    with pytest.raises(ValueError, match=r"'macs' of .* is None, not a number"):
        pareto_front([{"score": 1.0}])
    with pytest.raises(ValueError, match="is nan"):
        pareto_front([{"macs": math.nan, "score": 1.0}])
    with pytest.raises(ValueError, match="sequence of at least one"):
        pareto_front([], costs="macs")


def test_the_fit_stays_near_what_was_published() -> None:
    fit = scaling.accuracy_fit()
    assert fit.residual < 0.2
    for row in (*RELEASED, *SCALED_B0):
        offset = fit.offset if row in SCALED_B0 else 0.0
        assert scaling.published_accuracy(row.spec) + offset == pytest.approx(row.top1, abs=0.5)
    with pytest.raises(ValueError, match="knows networks scaled from efficientnet_b0"):
        scaling.published_accuracy(model_spec("efficientnet_lite0"))


def test_marginal_gains_change_one_axis_and_are_ordered() -> None:
    base = model_spec("efficientnet_b0")
    gains = scaling.marginal_gains(base, scaling.published_accuracy, lambda spec: count(spec).macs / 1e9)
    assert {gain.axis for gain in gains} == set(Axes._fields)
    rates = [gain.rate for gain in gains]
    assert rates == sorted(rates, reverse=True)
    for gain in gains:
        assert gain.gain > 0 and gain.cost > 0
        before = replace(base, name=gain.spec.name)
        assert {name for name in Axes._fields if getattr(before, name) != getattr(gain.spec, name)} == {gain.axis}
    free = scaling.marginal_gains(base, lambda spec: spec.resolution, lambda spec: count(spec).parameters)
    assert (free[0].axis, free[0].rate) == ("resolution", math.inf)
    with pytest.raises(ValueError, match="step must be larger than 1"):
        scaling.marginal_gains(base, scaling.published_accuracy, lambda spec: 1.0, step=1.0)
