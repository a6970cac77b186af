"""`blip2 export`: the rows of an output in other formats, alone or next to their images."""
