"""Energy of a token on a target: its power, while it decodes, times the time of a token."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.measurement import Measurement
from edgekit.target import Target


def predict_energy(target: Target, rates: Sequence[Measurement]) -> list[Measurement]:
    """Predict the joules of a decoded token, idle power included; nothing where the target's power is not known.

    Watts over tokens/s, over the range of the rate; the profile's power is taken as it stands.
    """
    power = target.power
    watts = power.typical_w or power.max_w
    rate = next((rate for rate in rates if rate.name == "decode_tokens_per_s"), None)
    if watts is None or rate is None:
        return []
    words = "while decoding" if watts == power.typical_w else "at most"
    return [
        Measurement(
            name="energy_j_per_token",
            value=watts.value / rate.value,
            unit="J/token",
            kind="predicted",
            ci_low=watts.value / (rate.ci_high or rate.value),
            ci_high=watts.value / (rate.ci_low or rate.value),
            device=target.name,
            note=f"{watts.scope}: {watts.value:g} W {words}, by the target's profile, over the decode speed",
        )
    ]
