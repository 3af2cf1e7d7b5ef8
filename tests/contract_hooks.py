"""What schemathesis is to leave out of the requests that it makes, with the reasons."""

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
