"""Pictures of a folder or tar in memory: decoded and scaled once, before training, where all of them fit.

A photograph of 12 million pixels takes longer to decode than a small model to train on it. Its scaled version is a few
kilobytes, from which every crop is cut as from the file itself, to the bit. Left out: memory that the processes of a
machine share; each has its own copy.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

LIMIT = 1e9  # bytes of a process


def keep_in_memory(dataset, side, say, limit=LIMIT):
    """Reads all pictures of a data set, if they fit, so that from then on reading them costs nothing.

    side: of their crops, in pixels. say(line): what was kept and how long it took. Raises UserError
    for a picture that cannot be read.
    """
    if dataset.in_memory or len(dataset) * 3 * side * side > limit:
        return
    folder, numbers = dataset, range(len(dataset))
    while not hasattr(folder, "scaled"):  # parts of a data set (runtime.some_classes) number their pictures anew
        folder, numbers = folder.dataset, sorted({int(folder.kept[i]) for i in numbers})
    start, size, kept = time.perf_counter(), 0, {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # threads: Pillow decodes outside of Python's lock
        for i, picture in zip(numbers, pool.map(folder.scaled, numbers)):  # an error cancels what has not begun
            kept[i], size = picture, size + picture.nbytes
            if size > limit:  # long pictures that are augmented are kept whole
                pool.shutdown(cancel_futures=True)
                return say(f"the pictures take more than {limit / 1e9:.1f} GB: they are read again in every epoch")
    folder.kept, folder.in_memory = kept, True
    if (elapsed := time.perf_counter() - start) > 1:
        say(f"{len(kept)} pictures are kept in memory ({size / 1e9:.2g} GB), prepared in {elapsed:.0f} s")
