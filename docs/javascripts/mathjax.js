// MathJax lies beside this file (tex-svg.js of npm's mathjax 3.2.2, Apache License 2.0), so that pages work offline.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex", enableMenu: false },
};
