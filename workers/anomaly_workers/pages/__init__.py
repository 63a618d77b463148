"""The project pages: what is known of a project, drawn for people; the front end serves them, `report` writes one."""
