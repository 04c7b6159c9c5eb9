"""Preference data: ranked lists, one prompt with its responses, best first.

    lists          read, check, reject, split: any source becomes one Dataset; `deft check` from the shell
    sources        files, folders and the hub, and the formats of their rows
    mini_world     the authored world of data/mini, with its known true reward

Start with `lists.read`. A new file format is one function in `sources.FORMATS`.
"""
