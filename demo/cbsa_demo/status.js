// What happened is read out.
element.setAttribute("role", "status");
