"""Credentials in the URLs of a profile: taken out as it is read, given back where a server is asked, shown nowhere.

    hidden({"url": "http://me:SECRET@host/v1?api-key=K"})      # {"url": "http://host/v1"}
    given("http://host/v1")                                    # "http://me:SECRET@host/v1?api-key=K"

They travel in the environment, so that the kernel of a notebook that this process starts has them too.
"""

import json
import os
import re
from urllib.parse import parse_qsl, urlencode, urlsplit

VARIABLE = "DEFT_URLS"  # {URL as it is shown: as it was given}
SHOWN = ("api-version",)  # parameters that are no secret: Azure's
_URL = re.compile(r"\b[a-zA-Z][\w+.-]{0,20}://[^\s\"'<>`]*[^\s\"'<>`.,;:!?)\]]")


def without(url):
    """The URL as results may show it: no user, no password, no parameter but `SHOWN`, no fragment."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
    except ValueError:  # no address that anything could be sent to
        return "(URL)"
    query = urlencode([(name, value) for name, value in parse_qsl(parts.query) if name in SHOWN])
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query, fragment="").geturl()
    return shown if "://" in url else shown.removeprefix("//")


def redacted(text):
    """A text with every URL in it as results may show it."""
    return _URL.sub(lambda found: without(found[0]), text)


def hidden(tree):
    """Nested settings with every URL as results may show it; `given` knows the whole ones from now on.

    What a setting called `url` holds is one, however it is spelled. Raises ValueError for two URLs that would be shown
    alike.
    """
    found = {}
    shown = _hidden(tree, "", found)
    if found:
        os.environ[VARIABLE] = json.dumps(_known() | found)
    return shown


def _hidden(tree, key, found):
    if isinstance(tree, dict):
        return {name: _hidden(value, name, found) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_hidden(value, key, found) for value in tree]
    is_url = isinstance(tree, str) and (key.rpartition(".")[2] == "url" or _URL.fullmatch(tree.strip()))
    if not is_url or not tree.strip():
        return tree
    shown = without(tree.strip())
    if shown != tree and found.setdefault(shown, tree.strip()) != tree.strip():
        raise ValueError(f"two different credentials for {shown}: give one of them another name for its host")
    return shown


def given(url):
    """The URL with the credentials that it was given with, if any."""
    return _known().get(url, url)


def _known():
    return json.loads(os.environ.get(VARIABLE, "{}"))
