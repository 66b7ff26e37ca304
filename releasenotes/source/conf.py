project = "sami_plugin"
project_copyright = "The sami_plugin authors"

extensions = ["reno.sphinxext"]

html_theme = "alabaster"
html_show_sourcelink = False
