"""Everything about files, and the one line that a mistake of the user gets.

errors         UserError, and run(main), which turns it into one line
saving         whole files or none
locks          one process at a time
download       a file from the network, once
images         one JPEG, PNG or WEBP file -> RGB, and two ways to crop it
weights        a file of weights, checked, into a module
picture_index  which pictures a folder or a tar holds, by class
captions       which pictures it holds, each with its caption
"""

from runtime.files.captions import decode, index_captions, json_lines
from runtime.files.download import cached_download
from runtime.files.errors import UserError, run
from runtime.files.images import cut_long_sides, read_image, released_crop
from runtime.files.locks import lock_or_refuse, lock_or_wait
from runtime.files.picture_index import index_pictures, pictures_below
from runtime.files.saving import check_writable, make_folder, sync_folder, whole_file
from runtime.files.weights import load_tensors, load_weights
