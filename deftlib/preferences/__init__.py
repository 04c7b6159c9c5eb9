"""Preference data: ranked lists, one prompt with its responses, best first.

    lists          read, check, reject, split: any source becomes one Dataset
    batches        ranked lists a thousand at a time, from and to Parquet, in flat memory
    formats        what a row means: the formats of this field, by the names of their columns
    cells          what a cell holds: text, lists that CSV spells, numbers of any country
    cleaning       HH-RLHF as the PRO authors cleaned it
    sources        which files: one, a folder in any of the usual layouts, the hub
    readers        the rows of one file: JSON lines, a JSON array, CSV, Parquet, in any encoding
    dialogues      text with turns: one format, every way into it, and what chat templates take
    mini_world     the authored world of data/mini, with its known true reward

Start with `lists.read`. A new format of rows is one function, and one entry of `formats.FORMATS` with its keys.
"""
