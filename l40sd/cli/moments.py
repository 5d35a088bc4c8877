"""Moments as people write them at a command line."""

import re
from datetime import datetime, timedelta

_UNITS = {"s": "seconds", "sec": "seconds", "m": "minutes", "min": "minutes", "h": "hours", "d": "days"}
_PART = r"(\d{1,9}) ?(s|sec|m|min|h|d)"
EXAMPLES = '"10 min", "1h 30m", "21:04" or "2026-11-23 21:04:43"'


def parse_moment(text: str, now: datetime) -> datetime:
    """Return the moment that a text means.

    Args:
        text: So long ago (``90s``, ``10 min``, ``1h 30m``, ``2d``), a time of today (``21:04``, ``21:04:43``; where
            that is still to come, of yesterday), or a date, with or without a time, in ISO 8601.
        now: With its time zone, which is that of whatever names none.

    Raises:
        ValueError: It is none of these.
    """
    text = text.strip()
    if re.fullmatch(rf"{_PART}( ?{_PART})*", text):
        parts = re.findall(_PART, text)
        try:
            return now - sum((timedelta(**{_UNITS[unit]: int(count)}) for count, unit in parts), timedelta())
        except OverflowError as error:
            raise ValueError(f'"{text}" is too long ago') from error
    if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
        hour, minute, second = (*map(int, text.split(":")), 0)[:3]
        today = now.replace(hour=hour, minute=minute, second=second, microsecond=0)
        return today if today <= now else today - timedelta(days=1)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f'"{text}" is no time: {EXAMPLES}') from error
    return moment if moment.tzinfo else moment.replace(tzinfo=now.tzinfo)
