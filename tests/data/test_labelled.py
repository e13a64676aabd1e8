import gzip
import json

import numpy as np
import pytest

from jaxopt_lab import data
from jaxopt_lab.data import LabelledFiles, MovieSentences, Topics, labelled, packages, tables
from jaxopt_lab.data.builder import read_labelled, write_labelled
from jaxopt_lab.data.labelled import SPLITS


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory that stands for every fetched package; the cache is there as well."""
    monkeypatch.setattr(packages, "find", lambda name, *, cache_dir=None: tmp_path)
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def ratings(place, count=60):
    """Sentence n has a score of -2, -1, 0, 1 or 2."""
    rows = (f"{n}\t{n % 5 - 2}.0\tsentence {n}\twith a tab" for n in range(1, count + 1))
    (place / "movieReviewSnippets_GroundTruth.txt").write_text("\n".join(rows) + "\n")


def sizes(corpus):
    return [len(getattr(corpus, split).texts) for split in SPLITS]


def test_the_fixed_split_of_movie_sentences(place):
    ratings(place)
    corpus = data.prepare_labelled(MovieSentences())
    kept = [n for n in range(1, 61) if n % 5 != 2]
    for split, digits in (("test", {0}), ("validation", {1}), ("train", set(range(2, 10)))):
        wanted = [n for n in kept if n % 10 in digits]
        part = getattr(corpus, split)
        assert part.ids == tuple(f"{n:05d}" for n in wanted)
        assert part.texts == tuple(f"sentence {n}\twith a tab" for n in wanted)
        assert part.labels.tolist() == [int(n % 5 > 2) for n in wanted]
        assert part.labels.dtype == np.int32
    assert corpus.classes == ("negative", "positive")


def test_ten_folds_test_every_sentence_once(place):
    ratings(place)
    folds = [MovieSentences(fold).read() for fold in range(10)]
    tested = sorted(row for _, rows in folds for row in rows["test"])
    assert tested == sorted(row for row in [r for rows in folds[3].rows.values() for r in rows])
    assert folds[9].rows["validation"] == folds[0].rows["test"]
    for _, rows in folds:
        assert not set(rows["train"]) & {*rows["test"], *rows["validation"]}
    with pytest.raises(ValueError, match="MovieSentences.fold: got 10, wanted one of 0 to 9"):
        MovieSentences(10)


def test_topics_skip_the_header_and_posts_without_a_group(place):
    header = "Category\tText\nd\tstring\nclass\t\n"
    for split in ("train", "test"):
        rows = (f"{'ab'[n % 2]}.group\tpost {n} of {split}\n" for n in range(80))
        (place / f"20newsgroups-{split}.tab").write_text(header + "\tlost\n" + "".join(rows))
    corpus = data.prepare_labelled(Topics())
    assert corpus.classes == ("a.group", "b.group")
    assert len(corpus.test.texts) == 80 and corpus.test.texts[:2] == (
        "post 0 of test",
        "post 1 of test",
    )
    assert corpus.test.labels.tolist() == [0, 1] * 40
    train, validation, _ = sizes(corpus)
    assert train + validation == 80 and 0 < validation < 25


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_files_with_a_given_split(place):
    train = write_csv(place / "train.csv", ['"one, two",10', "three,9", "four,10"])
    test = write_csv(place / "test.csv", ["9,three"], header="label,text")
    validation = place / "validation.jsonl"
    validation.write_text('{"text": "five", "label": 10, "more": 1}\n\n{"text": "ü", "label": "9"}')
    corpus = data.prepare_labelled(LabelledFiles(train, str(validation), test))
    assert corpus.classes == ("9", "10")  # by size
    assert corpus.train.texts == ("one, two", "three", "four")
    assert corpus.train.labels.tolist() == [1, 0, 1]
    assert corpus.validation.texts == ("five", "ü")
    assert corpus.repeated == {"validation": 0, "test": 1}
    again = data.prepare_labelled(
        LabelledFiles(train, str(validation), test, classes=("10", "9", "8"))
    )
    assert again.train.labels.tolist() == [0, 1, 0] and again.hash != corpus.hash


def test_hashed_splits_keep_equal_texts_together_and_rows_where_they_are(place):
    rows = [f"text {n % 150},{'ab'[n % 2]}" for n in range(300)]
    first = data.prepare_labelled(LabelledFiles(write_csv(place / "a.csv", rows)))
    more = [f"new {n},a" for n in range(100)]
    second = data.prepare_labelled(LabelledFiles(write_csv(place / "b.csv", more + rows)))
    assert sum(sizes(first)) == 300 and min(sizes(first)[1:]) >= 10
    assert first.repeated == {"validation": 0, "test": 0}
    for split in SPLITS:
        assert set(getattr(first, split).texts) <= set(getattr(second, split).texts)


def test_the_cache_is_keyed_by_content(place):
    path = write_csv(place / "a.csv", [f"text {n},{'ab'[n % 2]}" for n in range(60)])
    source = LabelledFiles(path)
    first = data.prepare_labelled(source)
    told = []
    second = data.prepare_labelled(source, on_progress=told.append)
    assert second.hash == first.hash and second.train.texts == first.train.texts
    assert len(list((place / "cache" / "labelled").glob("*.lock"))) == 1
    write_csv(place / "a.csv", [f"text {n},{'ba'[n % 2]}" for n in range(60)])
    assert data.prepare_labelled(source).hash != first.hash


ROWS = [f"text {n},{'ab'[n % 2]}" for n in range(60)]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.csv": ("words,label", "x,a")}, {}, r"a\.csv: got the columns .* wanted text too"),
        ({"a.csv": ("words", "x")}, {}, r"wanted text and label too"),
        ({"a.csv": ("text,label", "x,a", ",b")}, {}, r"a\.csv, line 3: got the text '', wanted a"),
        ({"a.csv": ("text,label", "x")}, {}, r"a\.csv, line 2: got the label None, wanted a label"),
        ({"a.csv": ("text,label", *ROWS)}, {"classes": ("a", "c")}, r"a\.csv, line 3: got the "
            "label 'b', wanted one of a, c"),
        ({"a.csv": ("text,label", *ROWS), "b.csv": ("text,label", "x,a", "y,c")},
            {"test": "b.csv"}, r"b\.csv, line 3: got the label 'c', wanted one of a, b"),
        ({"a.csv": ("text,label", *ROWS), "b.csv": ("text,label",)}, {"test": "b.csv"},
            r"labelled-files:a\.csv: the test part is empty, of 60 rows"),
        ({"a.csv": ("text,label", "x,a", "y,b")}, {}, "part is empty, of 2 rows"),
        ({"a.csv": ("text,label", *(f"{n},a" for n in range(60)))}, {}, "wanted at least two"),
        ({"a.jsonl": ('{"text": "x", "label": "a"}', "{")}, {}, r"a\.jsonl, line 2: not JSON"),
        ({"a.jsonl": ('{"text": "x"}',)}, {}, r"a\.jsonl, line 1: got \['text'\], wanted text and"),
        ({"a.jsonl": ("[1]",)}, {}, r"a\.jsonl, line 1: got list, wanted text and label"),
        ({"a.jsonl": ('{"text": "x", "label": 0.5}',)}, {}, "line 1: got the label 0.5, wanted"),
        ({"a.txt": ("x",)}, {}, "wanted a csv or jsonl file"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_the_line(place, monkeypatch, files, options, message):
    monkeypatch.chdir(place)
    for name, lines in files.items():
        (place / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        data.prepare_labelled(LabelledFiles(next(iter(files)), **options))


def test_bad_options_and_absent_packages(tmp_path):
    with pytest.raises(ValueError, match=r"test_fraction: got 0.5, wanted a share in \(0, 0.5\)"):
        LabelledFiles("a.csv", test_fraction=0.5)
    with pytest.raises(ValueError, match="classes: got .* wanted distinct names"):
        LabelledFiles("a.csv", classes=("a", "a"))
    LabelledFiles("a.csv", test="b.csv", test_fraction=0.5)  # not needed
    for source in (MovieSentences(), Topics()):
        with pytest.raises(ValueError, match=f"run `jaxopt-lab data fetch {source.name}`"):
            data.prepare_labelled(source, cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError):
        data.prepare_labelled(LabelledFiles(str(tmp_path / "a.csv")))


ADULT = "{age}, {work}, 10, x, 9, y, z, r, White, Male, {gain}, 0, 40, Home, {income}"


def test_a9a_is_encoded_with_levels_and_quintiles_of_the_training_rows(place):
    train = [
        ADULT.format(age=20 + n, work="?" if n == 0 else "ab"[n % 2], gain=n % 3, income="<=50K")
        for n in range(10)
    ]
    test = [
        "|a comment",
        ADULT.format(age=90, work="b", gain=0, income=">50K."),
        ADULT.format(age=21, work="new", gain=5, income="<=50K."),
    ]
    (place / "adult.data").write_text("\n".join(train) + "\n\n")
    (place / "adult.test").write_text("\n".join(test) + "\n")
    seen, given = tables.a9a(), tables.a9a("test")
    assert seen.features.shape[1] == given.features.shape[1]
    # Work has the levels a and b, the seven other categories one each, age five quintiles.
    assert seen.features[0, :2].tolist() == [False, False]
    assert seen.features[1, :2].tolist() == [False, True]
    ages = seen.features[:, 9:14]
    assert ages.sum(0).tolist() == [2, 2, 2, 2, 2] and (ages.sum(1) == 1).all()
    assert given.features[0, :2].tolist() == [False, True] and given.features[0, 13]
    assert given.features[1, :2].tolist() == [False, False] and given.features[1, 9]
    assert given.labels.tolist() == [1, -1] and set(seen.labels.tolist()) == {-1}


def test_images_and_files_that_are_none(place):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    header = b"\0\0\x08\3" + np.array([2, 28, 28], ">u4").tobytes()
    path = place / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + images.tobytes()))
    labels = b"\0\0\x08\1" + np.array([2], ">u4").tobytes() + bytes([3, 9])
    (place / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    table = tables.fashion_mnist("test")
    assert (table.features == images).all() and table.labels.tolist() == [3, 9]
    for content, message in (
        (gzip.compress(header + b"1"), "got 1 bytes, wanted those of"),
        (gzip.compress(b"text"), "wanted that of an IDX file"),
        (b"text", "not a complete gzip file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            tables.read_idx(path)


@pytest.mark.slow
def test_the_real_sets(tmp_path):
    for name in ("movie-sentences", "topics", "a9a", "mushroom", "fashion-mnist"):
        data.fetch(name, cache_dir=tmp_path)
    movies = data.prepare_labelled(MovieSentences(), cache_dir=tmp_path)
    assert sizes(movies) == [8087, 978, 1007]
    folds = [len(MovieSentences(fold).read(tmp_path).rows["test"]) for fold in range(10)]
    assert sum(folds) == 10_072
    labels = np.concatenate([getattr(movies, split).labels for split in SPLITS])
    assert labels.sum() == 4_996
    topics = data.prepare_labelled(Topics(), cache_dir=tmp_path)
    assert sizes(topics) == [10_093, 1_200, 7_528] and len(topics.classes) == 20
    for split, rows, positive in (("train", 32_561, 7_841), ("test", 16_281, 3_846)):
        table = tables.a9a(split, cache_dir=tmp_path)
        assert table.features.shape == (rows, 121) and (table.labels == 1).sum() == positive
    assert tables.a9a(cache_dir=tmp_path).features.sum() == 451_592
    assert tables.mushroom(cache_dir=tmp_path).features.shape == (5_644, 98)
    for split, count in (("train", 6_000), ("test", 1_000)):
        table = tables.fashion_mnist(split, cache_dir=tmp_path)
        assert np.bincount(table.labels).tolist() == [count] * 10
        assert table.features.shape == (10 * count, 28, 28)


def test_ids_order_rows_as_they_were(place):
    rows = [labelled.LabelledText(f"{n:03d}", f"t{n}", n % 2) for n in range(300)]
    write_labelled(place, {"train": rows[::-1], "test": rows[:1]}, ["a", "b"])
    assert read_labelled(place) == {"train": rows, "test": rows[:1]}


def test_json_labels_of_numbers_are_names(place):
    path = place / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{n}", "label": n % 3}) for n in range(90)))
    assert data.prepare_labelled(LabelledFiles(str(path))).classes == ("0", "1", "2")
