"""A sample: one document, or one example of a task. What readers make of rows, whatever the data set calls its columns.

Its name decides whether it is held out (sources.py), so it must be the same on every machine.
"""

from __future__ import annotations

from typing import NamedTuple


class Sample(NamedTuple):
    name: str
    """unique in its source: "p3/imdb.jsonl#17", "task843_x#3" """
    text: str
    """the document; of a task the answer"""
    prompt: str = ""
    """what a task gives; empty: plain text"""
    task: str = ""
    """samples of one task may stand before each other as solved examples"""
    definition: str = ""
    """what the task is, in words"""
