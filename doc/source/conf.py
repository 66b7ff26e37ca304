project = "sami_plugin"
project_copyright = "The sami_plugin authors"

extensions = [
    "cliff.sphinxext",
    "oslo_config.sphinxext",
    "reno.sphinxext",
]

html_theme = "alabaster"
html_theme_options = {
    "description": "Moves a guest's firewall state with it",
    "fixed_sidebar": True,
    "page_width": "72rem",
}
html_static_path = ["_static"]
html_show_sourcelink = False

nitpicky = True
