"""CEL rules of the CRD, which mirror the validators of api.py.

Each message names field, value and rule; the static one is for readers of the CRD. What a rule
reads has a bound in the schema, because the API server budgets the cost of rules by it.
"""

from __future__ import annotations

from collections.abc import Mapping

from tilefleet_operator.api import MAX_NAME_LENGTH, MAX_WINDOW, NAME_PATTERN, URI_SCHEMES


def _number(value: str, digits: int) -> str:
    """CEL text of an integer below 10 ** digits, digit by digit.

    string() has no bound that the API server knows, so its cost estimate refuses the whole CRD.
    """

    def digit(power: int) -> str:
        at = f"{value} / {10**power} % 10" if power else f"{value} % 10"
        return f"'0123456789'.substring({at}, {at} + 1)"

    parts = [
        f"({value} >= {10**power} ? {digit(power)} : '')" for power in range(digits - 1, 0, -1)
    ]
    return " + ".join([*parts, digit(0)])


_WHOLE = "['Any', 'SPX']"
_SPLIT = f"(f.count == 0 ? self.count : f.count) > 1 && !(f.partition.compute in {_WHOLE})"
_SPANS = ", which gives wrong results; set count to 1 or compute to SPX"
_NPS4 = (
    "{0}.partition.memory == 'NPS4' && {0}.products.exists(p, p == 'MI300X')"
    " && !({0}.partition.compute in ['Any', 'CPX'])"
)


def _rule(rule: str, message: str, expression: str) -> dict[str, str]:
    return {"rule": rule, "message": message, "messageExpression": expression}


ROOT_RULES = [
    _rule(
        f"self.metadata.name.size() <= {MAX_NAME_LENGTH}",
        f"metadata.name: must have at most {MAX_NAME_LENGTH} characters",
        "'metadata.name: ' + self.metadata.name + ' has '"
        f" + {_number('self.metadata.name.size()', 3)}"
        f" + ' characters; at most {MAX_NAME_LENGTH}, because pod names add revision and slot'",
    ),
    _rule(
        f"self.metadata.name.matches('{NAME_PATTERN}')",
        "metadata.name: must start with a letter and hold only a-z, 0-9 and -",
        "'metadata.name: ' + self.metadata.name"
        " + ' must start with a letter and hold only a-z, 0-9 and -; it names the Service'",
    ),
]

# Path of the object below spec → its rules.
RULES: Mapping[tuple[str, ...], list[dict[str, str]]] = {
    ("model",): [
        _rule(
            f"[{', '.join(repr(scheme) for scheme in URI_SCHEMES)}].all(s,"
            " self.uri.startsWith(s) == oldSelf.uri.startsWith(s))",
            "uri: the scheme is immutable; create a new InferenceDeployment instead",
            "'uri: ' + self.uri + ' changes the scheme of ' + oldSelf.uri"
            " + '; the scheme is immutable, create a new InferenceDeployment instead'",
        )
    ],
    ("accelerator",): [
        _rule(
            "self.vendor != 'cpu' || self.count == 0",
            "count: must be 0 when vendor is cpu",
            f"'count: ' + {_number('self.count', 1)} + ' needs devices, but vendor is cpu;"
            " remove count or set vendor to amd'",
        ),
        _rule(
            "self.vendor != 'cpu' || (self.products.size() == 0 && self.deviceIDs.size() == 0)",
            "products, deviceIDs: must be empty when vendor is cpu",
            "'products: ' + self.products.join(',') + self.deviceIDs.join(',')"
            " + ' names GPUs, but vendor is cpu; remove them or set vendor to amd'",
        ),
        _rule(
            "self.vendor != 'cpu' || (self.fallbacks.size() == 0 && self.resourceName == '')",
            "fallbacks, resourceName: must be empty when vendor is cpu",
            "'fallbacks, resourceName: ' + self.resourceName + ' name GPUs, but vendor is cpu;"
            " remove them or set vendor to amd'",
        ),
        _rule(
            f"self.count <= 1 || self.partition.compute in {_WHOLE}",
            "count: must be 1 on partitions of a GPU",
            f"'count: ' + {_number('self.count', 1)} + ' spans partitions of mode '"
            f" + self.partition.compute + '{_SPANS}'",
        ),
        _rule(
            f"self.fallbacks.all(f, !({_SPLIT}))",
            "fallbacks: count must be 1 on partitions of a GPU",
            f"'fallbacks: a count above 1 spans partitions of mode '"
            f" + self.fallbacks.filter(f, {_SPLIT})[0].partition.compute + '{_SPANS}'",
        ),
        _rule(
            f"!({_NPS4.format('self')}) && !self.fallbacks.exists(f, {_NPS4.format('f')})",
            "partition: memory NPS4 on MI300X needs compute CPX",
            "'partition: compute ' + self.partition.compute + ' with memory NPS4 does not exist on"
            " MI300X; set compute to CPX or memory to NPS1'",
        ),
        _rule(
            "self.resourceName in ['', 'amd.com/gpu'] || self.partition.compute == 'Any' ||"
            " self.resourceName.startsWith('amd.com/' + self.partition.compute.lowerAscii() + '_')",
            "resourceName: must be of partition.compute",
            "'resourceName: ' + self.resourceName + ' is not of partition.compute '"
            " + self.partition.compute + '; change one of them'",
        ),
    ],
    ("autoscaling",): [
        _rule(
            "self.minReplicas <= self.maxReplicas",
            "minReplicas: must not exceed maxReplicas",
            f"'minReplicas: ' + {_number('self.minReplicas', 4)} + ' exceeds maxReplicas '"
            f" + {_number('self.maxReplicas', 4)} + '; lower minReplicas or raise maxReplicas'",
        ),
        _rule(
            "double(self.targetUtilization) > 0.0 && double(self.targetUtilization) <= 1.0",
            "targetUtilization: must be above 0 and at most 1",
            "'targetUtilization: ' + self.targetUtilization + ' is not above 0 and at most 1'",
        ),
    ],
    ("autoscaling", "scaleDown"): [
        _rule(
            f"duration(self.window) <= duration('{MAX_WINDOW}')",
            f"window: must be at most {MAX_WINDOW}",
            f"'window: ' + self.window + ' is longer than {MAX_WINDOW}'",
        )
    ],
    ("rollout",): [
        _rule(
            "self.maxSurge + self.maxUnavailable >= 1",
            "maxSurge, maxUnavailable: one of them must be above 0",
            "'maxSurge: 0 and maxUnavailable 0 leave no room for a rollout; raise one of them'",
        )
    ],
}
