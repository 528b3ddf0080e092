"""Hooks of MkDocs: MathML for equations, plain code for the roles of Sphinx."""

from __future__ import annotations

import re
from html import unescape

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):<code>")


def on_page_content(html: str, **_: object) -> str:
    """Return a page's HTML with MathML in the place of TeX. Browsers show MathML without JavaScript or fonts from the network."""
    html = _EQUATION.sub(lambda found: convert(unescape(found[2]), display="block" if found[1] == "div" else "inline"), html)
    return _ROLE.sub("<code>", html)
