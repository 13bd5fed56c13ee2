// A page that was opened as a file cannot read other files, so the search shows the summaries of pages as excerpts.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
  const results = document.getElementById("search-results");
  if (results) {
    const script = document.createElement("script");
    script.src = "_static/summaries.js";
    const describe = () => {
      for (const link of results.querySelectorAll("li > a:not(.described)")) {
        link.classList.add("described");
        const summary = SUMMARIES[link.getAttribute("href").split("?")[0]];
        if (summary) link.parentElement.append(Object.assign(document.createElement("p"), { textContent: summary }));
      }
    };
    script.onload = () => { describe(); new MutationObserver(describe).observe(results, { childList: true, subtree: true }); };
    document.head.append(script);
  }
}
