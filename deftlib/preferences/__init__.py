"""Preference data: ranked lists, one prompt with its responses, best first.

    lists          read, check, reject, split: any source becomes one Dataset; `deft check` from the shell
    sources        opens files, folders and the hub, parses the formats of their rows; checks nothing
    dialogues      text with turns: one format, every way into it, and what chat templates take
    mini_world     the authored world of data/mini, with its known true reward

Start with `lists.read`. A new file format is one function, and one entry of `sources.FORMATS` with its keys.
"""
