"""experiments/docs: its code runs, its links lead somewhere, its tables are true; and (slow) the built site works."""

import contextlib
import functools
import html.parser
import http.server
import importlib.util
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.parse

import jax.numpy as jnp
import pytest

import mtjax

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "experiments" / "docs"
PAGES = {str(path.relative_to(DOCS / "pages")): path.read_text() for path in sorted((DOCS / "pages").rglob("*.md"))}
NOT_RUN = "<!-- not run: "  # before a block, with a reason


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of a page; included files have tests of their own."""
    found = re.findall(rf"^([^\n]*)\n\n?```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [code for before, code in found if NOT_RUN not in before and "--8<--" not in code]


WITH_CODE = [page for page, text in PAGES.items() if blocks(text, "python")]
COMPILES = ("concepts/models.md", "faq.md", "families/objectives.md", "families/operators.md", "families/vision.md")


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in COMPILES])
def test_code_of_the_page_runs(page):
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for number, block in enumerate(blocks(PAGES[page], "python")):
            exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", COMPILES)
def test_code_that_compiles_for_long_runs(page):
    test_code_of_the_page_runs(page)


def test_hardly_any_code_is_not_run():
    assert sum(text.count(NOT_RUN) for text in PAGES.values()) <= 2 and len(WITH_CODE) >= 8


def test_options_of_the_shell_examples_exist():
    """Every command is a script or a module of the repository; its options are fields or arguments in its source."""
    lines = [line for text in PAGES.values() for block in blocks(text, "bash") for line in block.splitlines()]
    assert len(lines) > 10
    machine = "".join((ROOT / "mtjax" / "train" / name).read_text() for name in ("command.py", "study.py"))
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "python", line
        # After a lone -- comes the command that a launcher starts.
        for command in [words[1:], words[words.index("--") + 2 :]] if "--" in words else [words[1:]]:
            own = command[: command.index("--")] if "--" in command else command
            path = own[1].replace(".", "/") + ".py" if own[0] == "-m" else own[0]
            folder = (ROOT / path).parent  # a command may be spread over several files
            source = (ROOT / path).read_text() + "".join(f.read_text() for f in folder.glob("*.py") if own[0] != "-m")
            for option in (word for word in own if word.startswith("--")):
                name = option.removeprefix("--").replace("-", "_")
                assert f'"{option}"' in source or re.search(rf"^    {name}: ", source + machine, flags=re.M), (
                    line,
                    option,
                )


def test_links_between_pages_exist():
    """Also to pages of the reference, which are made while the site is built, and to headings."""
    modules = hooks().public_modules()
    generated = {hooks().page_of(name) for name in modules} | {"measured/results.md"}
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            name = os.path.normpath(pathlib.Path(page).parent / path)
            assert name in PAGES or name in generated, (page, target)
            if anchor and name in PAGES:
                headings = re.findall(r"^#+ (.*)$", PAGES[name], flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings}


def test_every_page_is_in_the_navigation_and_included_files_exist():
    navigation = (DOCS / "mkdocs.yml").read_text()
    for page, text in PAGES.items():
        assert f": {page}\n" in navigation, page
        for included in re.findall(r'^--8<-- "([^"]+)"', text, flags=re.MULTILINE):
            assert (ROOT / included).is_file(), (page, included)


def test_docstrings_become_markdown():
    """Doctests are code, `<` outside of code is no tag, references are a paragraph, joint entries are taken apart."""
    module = part("docstrings")
    text = "|x| for x < y, `a<b`:\n\n    <g, d>\n\n>>> 1\n1\n\nReference: A and B,\n  2020."
    expected = "|x| for x &lt; y, `a<b`:\n\n    <g, d>\n\n```pycon\n>>> 1\n1\n```\n\n**Reference:** A and B,\n2020."
    assert module.to_markdown(text) == expected
    assert module.one_by_one("Args:\n  b1, b2: rates.") == "Args:\n  b1: see `b2`.\n  b2: rates."


def hooks():
    return part("hooks")


@functools.cache
def part(name):
    pytest.importorskip("mkdocs", reason="the documentation's extra is not installed: pip install 'mtjax[docs]'")
    pytest.importorskip("griffe", reason="the documentation's extra is not installed: pip install 'mtjax[docs]'")
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What pages say.


def test_the_three_lines_are_those_of_the_example():
    """The new side of the diff is plain_jax.py."""
    diff = re.search(r"^```diff\n(.*?)^```$", PAGES["outside.md"], flags=re.MULTILINE | re.DOTALL)[1]
    lines = [line[1:].rstrip() for line in diff.splitlines() if not line.startswith("-")]
    example = (ROOT / "experiments" / "outside" / "plain_jax.py").read_text()
    assert lines[0] in example.splitlines() and "\n".join(lines[3:]) in example
    assert sum(line.startswith("+") for line in diff.splitlines()) == 3


CALLS = re.findall(
    r"^\| [^|]+ \| [^|]+ \| [^|]+ \| `(mtjax\.optim\.[^|]*)` \|", PAGES["migration.md"], flags=re.MULTILINE
)


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_the_migration_table_are_methods(call):
    assert isinstance(eval(call, {"mtjax": mtjax}), mtjax.optim.Method)


def test_the_migration_table_has_every_method_of_both():
    """Names as they are in LibMTL 4336804 and TorchJD 0.18.0."""
    libmtl = """EW GradNorm UW MGDA DWA GLS PCGrad GradDrop IMTL GradVac CAGrad MOML Nash_MTL RLW AutoLambda MoCo
        Aligned_MTL FAMO SDMGrad MoDo FORUM STCH ExcessMTL FairGrad DB_MTL UPGrad"""
    torchjd = """AlignedMTL CAGrad ConFIG Constant CRMOGMWeighting DualProj ExcessMTL FairGrad GradDrop GradVac IMTLG
        Krum Mean MGDA MoDoWeighting NashMTL PCD PCGrad Random SDMGradWeighting Sum TrimmedMean UPGrad COSMOS DWA FAMO
        GeometricMean IMTLL PBI STCH UW"""
    table = [line.split("|") for line in PAGES["migration.md"].splitlines() if line.count("|") == 6]
    assert len(CALLS) >= 40
    for column, names in ((2, libmtl), (3, torchjd)):
        there = " ".join(row[column] for row in table)
        assert not [name for name in names.split() if not re.search(rf"\b{name}\b", there)]


def test_factors_between_the_libraries():
    """The factors that the table names, on two orthogonal gradients and one conflicting pair."""
    optim = mtjax.optim

    def direction(method, rows=((3.0, 0.0), (-1.0, 1.0))):
        return method.update(jnp.array(rows), method.init(None))[0]

    assert jnp.allclose(direction(optim.cagrad(0.5)), 1.25 * direction(optim.cagrad(0.5, rescale=1)), rtol=1e-5)
    assert jnp.allclose(
        direction(optim.aligned_mtl()), 2.0 * direction(optim.aligned_mtl(preference="mean")), rtol=1e-5
    )
    assert jnp.allclose(direction(optim.fairgrad(factor="tasks")), 2.0 * direction(optim.fairgrad()), rtol=1e-5)
    assert jnp.linalg.norm(direction(optim.nash_mtl())) <= 1.0 + 1e-5


def test_numbers_of_the_method_page_are_those_measured():
    """Every row of the first table is in the results, rounded."""
    report = json.loads((ROOT / "experiments" / "results" / "objectives_compare.json").read_text())
    gains = {(row["model"], row["task"]): row for row in report["rows"] if row["metric"] == "delta_m"}
    ranks = report["details"]["ranks"]["mean"]
    names = {"famo": "FAMO", "imtl_g": "IMTL-G", "cagrad": "CAGrad", "pcgrad": "PCGrad", "config": "ConFIG"}
    names |= {"upgrad": "UPGrad", "nash_mtl": "Nash-MTL", "uncertainty": "UW", "aligned_mtl": "Aligned-MTL"}
    names |= {"linear": "Sum", "rlw": "RLW", "mgda": "MGDA", "tuned sum": "tuned sum"}
    rows = [line.strip("| ").split(" | ") for line in PAGES["which_method.md"].splitlines() if line.count("|") == 6]
    rows = [row for row in rows if "±" in row[-1]]
    assert len(rows) == len(names)
    for first, rank, *cells in rows:
        model = names[first.split("`")[1] if "`" in first else first]
        assert float(rank) == round(ranks[model], 1)
        for data, cell in zip(("flights", "digits", "bench"), cells, strict=True):
            found = gains[model, data]
            assert cell == f"{found['mean']:.1f} ± {found['se']:.1f}", (model, data)


# The built site.


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built with warnings as errors."""
    pytest.importorskip("mkdocs", reason="the documentation's extra is not installed: pip install 'mtjax[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "mkdocs.yml"), "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(html.parser.HTMLParser):
    """What a page links to, loads, and offers as targets."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given.get("id"), given.get("name")} - {None}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        for name in ("src", "href"):
            if tag in ("img", "script", "link") and given.get(name):
                self.loaded.append(given[name])


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(site):
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 100
    broken = []
    for path, page in pages.items():
        for target in page.links + page.loaded:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                assert not (target in page.loaded and parts.scheme.startswith("http")), f"{path} loads {target}"
                continue
            file = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            anchor = urllib.parse.unquote(parts.fragment)
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].ids):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken, broken[:20]


LOOK = """<!doctype html><title>look</title><script>
const pages = PAGES, found = {};
async function look(page) {
  const frame = document.createElement("iframe");
  frame.width = 1200; frame.height = 800;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = "/" + page;
  document.body.append(frame);
  await loaded;
  const inside = frame.contentDocument;
  const images = [...inside.querySelectorAll("article img")];
  images.forEach(image => image.loading = "eager");
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  found[page] = {title: inside.title, heading: inside.querySelector("h1")?.innerText ?? "",
    height: inside.querySelector("article")?.getBoundingClientRect().height ?? 0,
    width: inside.querySelector("article")?.getBoundingClientRect().width ?? 0,
    images: images.map(image => [image.getAttribute("src"), image.naturalWidth])};
  frame.remove();
}
window.onload = async () => {
  for (const page of pages) await look(page).catch(error => found[page] = {error: String(error)});
  fetch("/found", {method: "POST", body: JSON.stringify(found)});
};
</script><body></body>"""


def look_at(site: pathlib.Path, pages: list[str], browser: str, profile: pathlib.Path) -> dict:
    """What a headless browser sees on these pages: it loads each in a frame and posts what it found."""
    found, done = {}, threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def do_GET(self):
            if self.path != "/look":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(LOOK.replace("PAGES", json.dumps(pages)).encode())

        def do_POST(self):
            found.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
        ]
        command = [browser, *options, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/look"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert done.wait(300), "the browser has not reported"
        finally:
            process.terminate()
            process.wait(30)
            server.shutdown()
    return found


@pytest.mark.slow
def test_pages_open_and_figures_load_in_a_browser(site, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    written = [page.removesuffix(".md") + ".html" for page in PAGES]
    pages = [*written, "measured/results.html", "reference/mtjax.html", "reference/mtjax.optim.cagrad.html"]
    found = look_at(site, pages, browser, tmp_path)
    assert list(found) == pages
    for page, seen in found.items():
        assert "error" not in seen, (page, seen)
        assert seen["heading"] and seen["title"].endswith("mtjax") and seen["height"] > 200, (page, seen)
        assert all(width > 0 for _, width in seen["images"]), (page, seen["images"])
    figures = len(re.findall(r"!\[", (ROOT / "experiments" / "RESULTS.md").read_text()))
    assert len(found["measured/results.html"]["images"]) == figures > 10
