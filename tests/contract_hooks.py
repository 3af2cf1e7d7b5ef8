# SPDX-License-Identifier: Apache-2.0
"""What schemathesis is to do otherwise with the requests that it makes, with the reasons."""

import schemathesis


@schemathesis.hook
def map_body(context, body):
    """Integers are written without a fraction: JSON Schema takes 2.0 for one, this API, as most, does not."""
    return plain(body)


def plain(value):
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    return value


@schemathesis.hook
def before_call(context, case, kwargs):
    """No two adapters of a VM have an id, an address or a VF in common, which JSON Schema cannot say. `api/tests/rest`
    has those that do."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("adapters"), list):
        body = case.body = {**body, "adapters": apart(body["adapters"])}
    # Nor that a VM boots either a file or one of its own disks.
    boot = body.get("boot") if isinstance(body, dict) else None
    if isinstance(boot, dict) and isinstance(boot.get("kernel"), str) and isinstance(boot.get("disk"), str):
        case.body = {**body, "boot": {name: value for name, value in boot.items() if name != "disk"}}


def apart(adapters):
    seen, told_apart = set(), []
    for number, adapter in enumerate(adapters):
        if isinstance(adapter, dict):
            adapter = dict(adapter)
            for member in ("id", "mac", "vf"):
                value = adapter.get(member)
                if not isinstance(value, str):
                    continue
                if (member, value.lower()) not in seen:
                    seen.add((member, value.lower()))
                elif member == "id":
                    adapter["id"] = f"another-{number}"
                else:
                    del adapter[member]
        told_apart.append(adapter)
    return told_apart
