"""Draws the rooms of the package and who imports whom, from the code: docs/rooms.svg.

    python docs/rooms.py

An arrow points to what a room imports; it may import what lies behind that too. A test draws the
picture again and compares.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "anymamba"
PICTURE = Path(__file__).with_name("rooms.svg")
# What each room answers, for the picture.
ANSWERS = {
    "cli": "the anymamba command",
    "server": "models behind HTTP",
    "training": "train, fine-tune, evaluate",
    "dropin": "import mamba_ssm",
    "modeling": "Transformers' API in PyTorch",
    "runtime": "models without PyTorch",
    "layers": "one torch layer of each kind",
    "ops": "operators and their backends",
    "checkpoint": "what is on disk",
}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 240, 58, 40, 62, 30


def rooms() -> list[str]:
    """The package's folders of modules that import others or are imported."""
    return [name for name in ANSWERS if (PACKAGE / name).is_dir()]


def imports(room: str) -> set[str]:
    """The other rooms that a room imports, at any time; not those for type checkers alone."""
    found = set()
    for file in (PACKAGE / room).rglob("*.py"):
        pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            parts = [name.split(".") for name in names]
            found |= {part[1] for part in parts if part[0] == PACKAGE.name and len(part) > 1}
            pending.extend(ast.iter_child_nodes(node))
    return (found & {*rooms()}) - {room}


def direct(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows without those that a way through other rooms implies."""

    def below(room: str) -> set[str]:
        return arrows[room].union(*(below(other) for other in arrows[room]))

    return {
        room: {one for one in others if not any(one in below(via) for via in others - {one})}
        for room, others in arrows.items()
    }


def floors(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The rooms from top to bottom: each above all that it imports."""
    height: dict[str, int] = {}

    def height_of(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((height_of(other) for other in arrows[room]), default=-1)
        return height[room]

    for room in arrows:
        height_of(room)
    by_floor: dict[int, list[str]] = {}
    for room in arrows:
        by_floor.setdefault(height[room], []).append(room)
    return [by_floor[floor] for floor in sorted(by_floor, reverse=True)]


def places(stack: list[list[str]]) -> dict[str, tuple[float, float]]:
    """The upper left corner of each room."""
    widest = max(map(len, stack))
    width = widest * WIDTH + (widest - 1) * GAP_X
    found = {}
    for floor, names in enumerate(stack):
        taken = len(names) * WIDTH + (len(names) - 1) * GAP_X
        # Every other floor a little aside, so that arrows do not run behind boxes.
        left = MARGIN + (width - taken) / 2 + (-1) ** floor * GAP_X / 2
        for at, name in enumerate(names):
            x = left + at * (WIDTH + GAP_X)
            found[name] = (x, MARGIN + floor * (HEIGHT + GAP_Y))
    return found


def picture() -> str:
    """The drawing as SVG."""
    arrows = {room: imports(room) for room in rooms()}
    stack = floors(arrows)
    at = places(stack)
    width = max(x for x, _ in at.values()) + WIDTH + MARGIN
    height = max(y for _, y in at.values()) + HEIGHT + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="system-ui, sans-serif" text-anchor="middle">',
        "<title>The rooms of the package</title>",
        "<desc>An arrow points to what a room imports: "
        + "; ".join(f"{room} {', '.join(sorted(to))}" for room, to in arrows.items() if to)
        + ".</desc>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#7a828e"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
    ]
    for room, others in direct(arrows).items():
        for other in sorted(others):
            (x1, y1), (x2, y2) = at[room], at[other]
            lines.append(
                f'<path d="M{x1 + WIDTH / 2:g} {y1 + HEIGHT:g}L{x2 + WIDTH / 2:g} {y2:g}" '
                'stroke="#7a828e" stroke-width="1.2" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in at.items():
        lines += [
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="8" '
            'fill="#fff4e8" stroke="#d9730d"/>',
            f'<text x="{x + WIDTH / 2:g}" y="{y + 25:g}" font-size="17" font-weight="600">'
            f"{room}</text>",
            f'<text x="{x + WIDTH / 2:g}" y="{y + 45:g}" font-size="13" fill="#555">'
            f"{ANSWERS[room]}</text>",
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"{PICTURE} is drawn")
