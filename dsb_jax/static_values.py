"""Static arguments of compiled functions that Python cannot hash: models with lists or dictionaries as fields."""

from typing import Any


class ByEquality:
    """Makes a value hashable: two are equal if the values are, or where that cannot be told, if they are one object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ByEquality) or type(self.value) is not type(other.value):
            return False
        if self.value is other.value:
            return True
        try:
            return bool(self.value == other.value)
        except ValueError:  # arrays among the fields
            return False

    def __hash__(self) -> int:
        return hash(type(self.value))


def as_static(value: Any) -> Any:
    """The value, or `ByEquality` of it if it has no hash."""
    try:
        hash(value)
    except TypeError:
        return ByEquality(value)
    return value


def original(value: Any) -> Any:
    """The inverse of `as_static`."""
    return value.value if isinstance(value, ByEquality) else value
