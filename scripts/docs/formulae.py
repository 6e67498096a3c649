"""MkDocs hook: formulae become MathML, which browsers draw by themselves."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def replace(match: re.Match) -> str:
        block = match["tag"] == "div"
        mathml = convert(html.unescape(match["latex"]).strip(), display="block" if block else "inline")
        return f'<div style="overflow-x: auto">{mathml}</div>' if block else mathml

    return FORMULA.sub(replace, content)
