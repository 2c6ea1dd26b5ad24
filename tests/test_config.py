"""`SteeringConfig`: layer sets, refusals in one line, and the round trip through plain JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer import SteerError, SteeringConfig
from steer.config import DTYPES, FORMAT_VERSION, POSITIONS, SITES, Condition


def message(error: pytest.ExceptionInfo[SteerError]) -> str:
    """The text of the error, which must be a single line."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", list(range(30))),
        ("last", [29]),
        (0, [0]),
        (29, [29]),
        (-1, [29]),
        (-30, [0]),
        ("12", [12]),
        ("-2", [28]),
        ("4-20", list(range(4, 21))),
        ("7-7", [7]),
        ("-3--1", [27, 28, 29]),
        ("27--1", [27, 28, 29]),
        ([0, 1, 5], [0, 1, 5]),
        ((5, 1, 0), [0, 1, 5]),
        (range(3), [0, 1, 2]),
        ([3, -1, 3, 29], [3, 29]),
        ("0,2-4,last", [0, 2, 3, 4, 29]),
        (" 0 , 2-4 ", [0, 2, 3, 4]),
        ([1, "last", "8-9", "3,4"], [1, 3, 4, 8, 9, 29]),
        ("3,all", list(range(30))),
    ],
)
def test_layer_sets(layers, expected):
    assert SteeringConfig(layers=layers).resolve_layers(30) == expected


@given(st.lists(st.integers(-12, 11), min_size=1))
def test_any_list_of_existing_layers_is_the_ascending_set_of_them(layers):
    assert SteeringConfig(layers=layers).resolve_layers(12) == sorted({layer % 12 for layer in layers})


@given(st.integers(0, 11), st.integers(0, 11))
def test_a_range_includes_both_ends(first, last):
    config = SteeringConfig(layers=f"{first}-{last}")
    if first <= last:
        assert config.resolve_layers(12) == list(range(first, last + 1))
    else:
        with pytest.raises(SteerError, match="backwards") as error:
            config.resolve_layers(12)
        assert f"{first}-{last}" in message(error)


@pytest.mark.parametrize("layers", [[], (), range(0)])
def test_an_empty_layer_set_is_refused(layers):
    with pytest.raises(SteerError, match="empty") as error:
        SteeringConfig(layers=layers)
    assert "'all'" in message(error)  # says how to fix it


@pytest.mark.parametrize(
    "layers",
    ["", " ", "some", "1..3", "1-2-3", "4-", "-", "1,,2", ",", "1.5", "first", 1.5, {"a": 1}, "9" * 5000],
)
def test_an_unreadable_layer_set_is_refused(layers):
    with pytest.raises(SteerError, match="not a layer set") as error:
        SteeringConfig(layers=layers)
    assert "4-20" in message(error)


@pytest.mark.parametrize("layers", [True, False, None, [True], [0, None]])
def test_a_bool_or_none_is_not_a_layer(layers):
    with pytest.raises(SteerError, match="not a layer set") as error:
        SteeringConfig(layers=layers)
    message(error)


@pytest.mark.parametrize("layers", [30, -31, "4-30", "-31-2", [0, 99], "all,30"])
def test_a_layer_that_the_model_lacks_is_refused_with_those_it_has(layers):
    with pytest.raises(SteerError, match="does not exist") as error:
        SteeringConfig(layers=layers).resolve_layers(30)
    assert "0 to 29" in message(error)


@pytest.mark.parametrize("layers", ["20-4", "-1-0", "last,3-2"])
def test_a_backward_range_is_refused(layers):
    with pytest.raises(SteerError, match="backwards") as error:
        SteeringConfig(layers=layers).resolve_layers(30)
    message(error)


@pytest.mark.parametrize(("name", "known"), [("site", SITES), ("positions", POSITIONS), ("dtype", DTYPES)])
@pytest.mark.parametrize("value", ["nonsense", "", None, 3, ["all"]])
def test_an_unknown_choice_is_refused_with_the_known_ones(name, known, value):
    with pytest.raises(SteerError, match=f"{name}=.*unknown") as error:
        SteeringConfig(**{name: value})
    assert all(choice in message(error) for choice in known)


@pytest.mark.parametrize("scale", ["1", None, True, math.nan, math.inf, -math.inf, [1.0]])
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    # an infinite one would turn zero vectors into NaN
    with pytest.raises(SteerError, match="scale=") as error:
        SteeringConfig(scale=scale)
    message(error)


def test_an_int_scale_becomes_a_float():
    assert isinstance(SteeringConfig(scale=2).scale, float)


def test_the_defaults_are_every_layer_every_token_after_the_layer_in_float32():
    config = SteeringConfig()
    assert (config.layers, config.site, config.positions) == ("all", "resid_post", "all")
    assert (config.scale, config.dtype, config.format_version) == (1.0, "float32", FORMAT_VERSION)


LINE = st.text().filter(str.isprintable)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
PART = st.sampled_from(["all", "last", "4-20", "-3--1"]) | st.integers(-99, 99)
CONFIGS = st.builds(
    SteeringConfig,
    layers=PART | st.lists(PART, min_size=1, max_size=4),
    site=st.sampled_from(list(SITES)),
    positions=st.sampled_from(list(POSITIONS)),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    dtype=st.sampled_from(DTYPES),
    base_model_name_or_path=st.none() | LINE,
    base_revision=st.none() | LINE,
    model_type=st.none() | LINE,
    hidden_size=st.none() | st.integers(1, 20000),
    num_hidden_layers=st.none() | st.integers(1, 200),
    provenance=st.none() | st.dictionaries(st.text(), JSON, max_size=3),
)


@given(CONFIGS)
def test_a_config_survives_json(config):
    assert SteeringConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_keeps_the_order_of_the_fields():
    whole = SteeringConfig(layers="1", condition=Condition(0, 0.5))
    assert list(whole.to_dict()) == list(SteeringConfig.__dataclass_fields__)
    assert SteeringConfig.from_dict(whole.to_dict()) == whole


def test_to_dict_is_a_copy():
    config = SteeringConfig(provenance={"data": ["gsm8k"]})
    config.to_dict()["provenance"]["data"].append("math")
    assert config.provenance == {"data": ["gsm8k"]}


def test_missing_fields_take_their_defaults():
    assert SteeringConfig.from_dict({"layers": 3}) == SteeringConfig(layers=3)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, "1", None, 1.5])
def test_another_format_version_is_refused_by_number(version):
    # a newer format may hold fields this version does not know: the version is what the user must hear about
    with pytest.raises(SteerError, match="format") as error:
        SteeringConfig.from_dict({"format_version": version, "field_of_the_future": 1})
    assert repr(version) in message(error)
    assert "field_of_the_future" not in message(error)


def test_a_newer_format_version_is_refused_by_the_constructor_too():
    with pytest.raises(SteerError, match="upgrade steer") as error:
        SteeringConfig(format_version=FORMAT_VERSION + 1)
    assert str(FORMAT_VERSION + 1) in message(error)


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(SteerError, match="unknown fields") as error:
        SteeringConfig.from_dict({"layers": "all", "layer": 3, "alpha": 1})
    assert "alpha, layer" in message(error)


def test_every_field_has_its_command_line_help():
    for name, field in SteeringConfig.__dataclass_fields__.items():
        assert field.metadata.get("help"), name
