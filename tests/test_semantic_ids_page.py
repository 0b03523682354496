"""semantic_ids.html: what it shows, in which order, and that nothing in the data can break out of it."""

import re

import numpy as np
import pytest
from html_page import check, check_stands_alone

from jaxrec.config import UserError
from jaxrec.page import page
from jaxrec.semantic_ids import SemanticIds
from jaxrec.semantic_ids.table.page import PageItems, figure_tables, percent, tree_section, write_page
from jaxrec.semantic_ids.table.quality import quality

EVIL = '<script>alert("1")</script>&\'"'
CODES = np.array([[0, n % 20, n % 3] for n in range(90)] + [[7, 0, 0]] * 12 + [[7, 1, 2]], np.int32)
SPACE = SemanticIds(CODES, (8, 20, 3))
IDS = [f"i{n:03}" for n in range(103)]
TITLES = [f"Title {n}" for n in range(101)] + [None, EVIL]
CATEGORIES = ["Tea"] * 60 + ["Soap"] * 30 + [None] * 12 + [EVIL]
POPULARITY = np.arange(103)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "semantic_ids.html"
    x = np.random.default_rng(0).normal(size=(103, 3)).astype(np.float32)
    figures = quality(SPACE, x, lambda codes: np.zeros((len(codes), 3), np.float32), np.array([[0, 20], [1, 5]]))
    write_page(path, SPACE, IDS, TITLES, CATEGORIES, POPULARITY, {**figures, "quantizer": EVIL})
    return path


def section_of(path, anchor):
    return path.read_text().split(f'<section id="{anchor}">')[1].split("</section>")[0]


def test_it_stands_alone_and_escapes_everything(written):
    check_stands_alone(written)
    assert check(written).text.count(EVIL) >= 3


def test_the_headline_has_the_figures(written):
    tiles = dict(re.findall(r'<div class="card"><b>([^<]+)</b><span>([^<]+)</span>', written.read_text()))
    # 60 IDs below <0> (20 and 3 have no common factor), of which 30 have two items; one of 12 and one of 1 below <7>.
    assert tiles["103"] == "items" and tiles["62"] == "distinct IDs"
    assert "conflict" in tiles[percent(72 / 103)] and "ICR" in tiles["50%"]
    assert "CUR total" in tiles[percent(62 / 480)]


def test_a_picture_a_level_and_one_for_buckets_error_and_pairs(written):
    page = check(written)
    assert page.tags.count("svg") == 3 + 1 + 2
    assert "Level 1 2 of 8 codes in use" in page.text and "Level 3 3 of 3 codes in use" in page.text


def test_the_tree_goes_from_coarse_to_fine_and_says_what_it_leaves_out(written):
    tree = section_of(written, "tree")
    # Branches: 0 and 7; below 0 twelve of its twenty, below 7 both.
    assert tree.count("<details>") == 2 + 12 + 2 and "and 8 more" in tree
    assert tree.index("&lt;0&gt;</code> 90 items") < tree.index("&lt;7&gt;</code> 13 items")
    assert "Tea 67%" in tree and "&lt;7,1&gt;</code> 1 item <" in tree
    # Of the thirteen below 7 only one has a category, which is no gist of them.
    assert "&lt;7&gt;</code> 13 items <span class=more>&lt;script" in tree and "8%" not in tree
    # The most popular items of a branch, by title or else by id, the most popular first; ten of twelve.
    below = tree.split("&lt;7,0&gt;")[1]
    assert re.findall(r"<li>.*?</code> (.*?)</li>", below)[:3] == ["i101", "Title 100", "Title 99"]
    assert "and 2 more" in below


def test_the_fullest_ids_come_first(written):
    crowded = section_of(written, "crowded")
    shown = re.findall(r"<h3><code>&lt;(.*?)&gt;</code> (\d+) items", crowded)
    # Items n and n + 60 have one ID, for n below 30; equally full IDs in their own order.
    pairs = sorted((0, n % 20, n % 3) for n in range(30))[:5]
    assert shown == [("7,0,0", "12"), *((",".join(map(str, code)), "2") for code in pairs)]
    assert "31 of 62 IDs stand for more than one item, 72 items in all" in crowded
    assert "<td>9-16</td><td>1</td><td>12</td>" in crowded and "<td>5-8</td><td>0</td><td>0</td>" in crowded


def test_examples_share_all_codes_but_the_last_and_have_several_ids(written):
    examples = section_of(written, "prefixes")
    assert "Items that share the first 2 of 3 codes" in examples and "20 such prefixes" in examples
    # The most popular: of the prefixes <0, n> those that hold the highest numbers; <7,0> and <7,1> have one ID each.
    prefixes = re.findall(r"<h3><code>&lt;(.*?)&gt;</code>", examples)
    popular = sorted(range(20), key=lambda n: (-POPULARITY[:90][CODES[:90, 1] == n].sum(), n))[:6]
    assert prefixes == [f"0,{n}" for n in popular]


def test_no_shared_ids_no_shared_prefixes_no_titles(tmp_path):
    codes = np.arange(4, dtype=np.int32)[:, None] * np.ones((1, 2), np.int32)
    write_page(tmp_path / "a.html", SemanticIds(codes, (4, 4)), list("abcd"))
    text = check(tmp_path / "a.html").text
    assert "Every item has an ID of its own." in text and "Items that share" not in text and "<3,3> d" in text
    assert "What is kept" not in text


def test_a_single_level_has_a_page(tmp_path):
    write_page(tmp_path / "a.html", SemanticIds(np.zeros((3, 1), np.int32), (2,)), list("abc"))
    assert "<0> 3 items" in check(tmp_path / "a.html").text


def test_it_is_the_same_bytes_when_written_again(written, tmp_path):
    for name in ("a", "b"):
        write_page(tmp_path / name, SPACE, IDS, TITLES, CATEGORIES, POPULARITY)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_popularity_comes_from_the_space_unless_given():
    space = SemanticIds(CODES, SPACE.codebook_sizes, POPULARITY)
    assert tree_section(PageItems(space, IDS)) == tree_section(PageItems(SPACE, IDS, counts=POPULARITY))
    assert tree_section(PageItems(space, IDS)) != tree_section(PageItems(SPACE, IDS))


def test_tables_of_incomplete_figures_leave_out_what_is_missing():
    html = figure_tables({"conflict_rate": 0.5, "codebook_sizes": [8], "levels": [{"use": 0.25}]})
    assert "<td>1</td><td>8</td><td>25%</td>" in html and "Levels together" not in html
    assert figure_tables({}) == "\n"
    assert "CUR" in figure_tables(quality(SPACE)) and "variance lost" not in figure_tables(quality(SPACE))


def test_columns_of_another_length_are_refused(tmp_path):
    with pytest.raises(UserError, match="2 titles do not fit 103 semantic IDs"):
        write_page(tmp_path / "a.html", SPACE, IDS, ["a", "b"])
    assert not list(tmp_path.iterdir())


def test_percentages_keep_four_digits():
    assert [percent(share) for share in (0, 0.5, 0.99951, 1, 2.814e-6)] == ["0%", "50%", "99.95%", "100%", "0.0002814%"]


def test_the_style_has_dark_colors_for_each_light_one():
    light, dark = re.findall(r":root \{(.*?)\}", page("x", ""), re.S)
    assert set(re.findall(r"--[\w-]+", light)) == set(re.findall(r"--[\w-]+", dark))
