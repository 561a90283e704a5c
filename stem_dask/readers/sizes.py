"""Which options would read a file of another size, or number of patterns, than expected.

Each proposal gives exactly the right number of bytes and patterns.
"""

from stem_dask.readers.flat import FlatFile, FramedFile, Run
from stem_dask.readers.source import Source, Wrapped, as_raw
from stem_dask.storage.location import at


def scan_ways(
    n: int, scan: tuple[int, int], ends: tuple[int, int] = (0, 0)
) -> list[tuple[str, str]]:
    """The options that fold ``n`` patterns when ``scan`` needs another number, and what they mean.

    Parameters
    ----------
    n : patterns, without those that ``ends`` leaves out
    scan : lines, positions per line
    ends : patterns left out already, at the beginning and at the end

    Examples
    --------
    >>> scan_ways(66, (6, 10))
    [('input.scan_shape: [6, 11], input.drop_columns: 1', 'lines that end with 1 flyback pattern')]
    >>> scan_ways(34, (6, 10))
    [('input.scan_shape: [3, 10], input.skip_frames: [0, 4]', '3 complete lines of 10 and 4 patterns')]
    """
    (height, width), (first, last) = scan, ends
    lines, rest = divmod(n, width)
    more = n - height * width
    if not lines:
        return [(f"input.scan_shape: [1, {n}]", "part of one line")]
    complete = f"{lines:,} complete line{'s' * (lines > 1)} of {width:,}"
    whole = (f"input.scan_shape: [{lines}, {width}]", complete)
    if more < 0:
        if not rest:
            return [whole]
        keys = f"{whole[0]}, input.skip_frames: [{first}, {last + rest}]"
        return [(keys, f"{complete} and {rest:,} pattern{'s' * (rest > 1)}")]
    columns, odd = divmod(more, height)
    ways = [] if rest else [whole]
    if not odd:
        keys = f"input.scan_shape: [{height}, {width + columns}], input.drop_columns: {columns}"
        # a flyback longer than the line is less likely than more lines
        at_first = 0 if columns < width else len(ways)
        ways.insert(
            at_first,
            (keys, f"lines that end with {columns:,} flyback pattern{'s' * (columns > 1)}"),
        )
    if odd or height == 1:
        begin = first + more if not last else [first + more, last]
        ways.append((f"input.skip_frames: {begin}", f"without the first {more:,}"))
        ways.append((f"input.skip_frames: [{first}, {last + more}]", f"without the last {more:,}"))
    return ways


def frame_way(name: str, source: Source, n: int) -> str:
    """The options that read ``n`` patterns with a longer header or footer each; empty when the size does not allow it."""
    if not name.lower().endswith((".raw", ".tvips")):
        return ""
    while isinstance(source, Wrapped):
        source = source.source
    height, width = source.shape[-2:]
    pixels = height * width * source.dtype.itemsize
    if isinstance(source, FlatFile):
        source = FramedFile((Run(source.path, source.offset, pixels, n),), source.dtype, (height, width))  # fmt: skip
    if not isinstance(source, FramedFile) or len(source.runs) > 1:
        return ""
    [run] = source.runs
    start, stack = run.offset - run.lead, (n, *source.frame_shape)
    n_bytes = at(run.path).stat().st_size - start
    more, odd = divmod(n_bytes - n * run.stride, n)
    if odd or not 0 < more < run.stride:
        return ""
    words = f"{more:,} bytes more at each of {n:,} patterns, a header or a footer"
    if not name.lower().endswith(".raw"):
        if n_bytes % run.stride == 0:  # as its own header says
            return ""
        return f"{as_raw(run.path, stack, source.dtype, start, run.lead, more)} ({words})"
    footer = run.stride - run.lead - pixels + more
    return f"input.shape: {list(stack)}, input.frame_header: {run.lead + more} or input.frame_footer: {footer} ({words})"
